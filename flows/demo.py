"""The demo: the whole job on a made-up language in which the true reward of every token is known.

It makes a small model and pairs, scores with vLLM, publishes weights, and trains a policy with them. Then it prints how well
the weights find the good and bad tokens, and compares three policies by their true reward: with these weights, without any
(DPO), and with weights that know the true rewards. A second run reuses everything.
"""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np

from flows.build import BuildResult
from flows.run import run_build
from pipeline.child import run_child
from pipeline.recipe import Recipe, load_recipe
from pipeline.toy.language import DEMO_LANGUAGE, agreement
from pipeline.toy.policy_table import SETTINGS, Points, policy_lines
from train.job.output import Result
from weights_store import WeightStore
from weights_store.errors import InputError
from weights_store.fingerprint import load_json
from weights_store.inspection.view import View
from weights_store.location import write_whole
from weights_store.processes.lock import locked
from weights_store.schemas import SIDES
from weights_store.views.held_out import held_out_lines

_NUM_PAIRS = 500
_NUM_CONVERSATIONS = 6000
_RECIPE = Path(__file__).with_suffix(".toml")
"""The recipe of a demo in the folder `demo`."""
_POLICY_SETTINGS = (
    "loss.name=tis_dpo",
    "loss.beta=0.3",
    "optim.learning_rate=3e-4",
    "optim.num_epochs=1",
    "optim.pairs_per_step=32",
    "optim.tokens_per_batch=4096",
)


def run_demo(folder: str | Path, debug: bool = False) -> None:
    """Run the whole job in `folder` and print a short table.

    Raises:
        InputError: Another process runs a demo there.
        TokenweightsError: A stage failed.
    """
    folder = Path(folder)

    def refuse(holder: str) -> None:
        raise InputError(f"{holder} runs a demo in {folder}; wait until it is done, or give another --folder")

    with locked(folder / ".lock", refuse):  # makes the folder, before the model is made, which takes minutes
        _run(folder, debug)


def _run(folder: Path, debug: bool) -> None:
    started = time.monotonic()
    _say("1/4 model and pairs")
    check_language(folder)
    if (folder / "model").is_dir():
        print(f"model: {folder / 'model'} exists already")
    else:
        from pipeline.toy.model_maker import make_chat_model  # imports torch

        make_chat_model(DEMO_LANGUAGE.sample_conversations(_NUM_CONVERSATIONS, seed=1), folder / "model")
    _make_pairs(folder / "pairs.jsonl")
    recipe_file = write_recipe(folder)
    recipe = load_recipe(recipe_file)
    _say("2/4 build: scores, weights")
    result = run_build(recipe, debug=debug)
    _say("3/4 train a weighted-DPO policy")
    metrics = _train_policy(recipe, result, folder)
    _say("4/4 do the weights help? Three policies")
    policies = _compare(recipe, result, folder / "policies")
    _print_table(result, metrics, _agreement(recipe, result))
    print("\n".join(["", *policy_lines(policies)]))
    page = _write_page(recipe, result, folder)
    print(f"\nrecipe: {recipe_file}\nstore:  {recipe.store.uri}\npolicy: {folder / 'policy'}")
    print(f"page:   {page} (open it in a browser)")
    print(f"done in {time.monotonic() - started:.0f} s\n\nGo on with:")
    for what, command in next_commands(recipe_file, recipe):
        print(f"  # {what}\n  {shlex.join(command)}")


def check_language(folder: Path) -> None:
    """Record which language the model and the pairs of a folder are made of.

    Raises:
        InputError: They are there already, and of another one.
    """
    file = folder / "language.json"
    language = {**asdict(DEMO_LANGUAGE), "num_pairs": _NUM_PAIRS, "num_conversations": _NUM_CONVERSATIONS}
    is_made = (folder / "model").exists() or (folder / "pairs.jsonl").exists()
    if is_made and not (file.is_file() and load_json(file) == language):
        raise InputError(
            f"model and pairs in {folder} were made of another language than this version's ({file.name} does not say "
            f"{json.dumps(language)}); remove the folder {folder}, or give another --folder"
        )
    write_whole(file, json.dumps(language))


def write_recipe(folder: Path) -> Path:
    """Write the demo's recipe and return its path; the paths in it are relative to where the demo was started."""
    start = json.dumps(f"{folder}/", ensure_ascii=False).removesuffix('"')
    text = _RECIPE.read_text(encoding="utf-8").replace('"demo/', start)
    write_whole(folder / "recipe.toml", text)
    return folder / "recipe.toml"


def next_commands(recipe_file: Path, recipe: Recipe) -> list[tuple[str, list[str]]]:
    """Return three commands that go on from a finished build, each with what it does."""
    store = ["--store", recipe.store.uri]
    stronger = ["build", str(recipe_file), *_set(["weights.name=toy/stronger", "weights.spread=0.6"])]
    train = ["--weights", recipe.weights.name, "--model", recipe.model.path, "--output", f"{recipe_file.parent}/dpo"]
    settings = ["loss.name=dpo", "loss.beta=0.1", "optim.learning_rate=3e-4"]
    return [
        ("look at pairs here", ["tokenweights", "view", recipe.weights.name, "--ansi", "--random", "3", *store]),
        ("other weights from the same log-probs, without scoring again", ["tokenweights", *stronger]),
        ("plain DPO on the same pairs, to compare", ["tokenweights", "train", *store, *train, *_set(settings)]),
    ]


def _set(settings: Sequence[str]) -> list[str]:
    return [argument for setting in settings for argument in ("--set", setting)]


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _make_pairs(path: Path) -> None:
    if path.is_file():
        print(f"pairs: {path} exists already")
        return
    pairs = DEMO_LANGUAGE.sample_pairs(_NUM_PAIRS, seed=2)
    write_whole(path, "".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"pairs: {len(pairs)} in {path}")


def _policy_folder(result: BuildResult, folder: Path) -> Path:
    reference = result.published.weights
    return folder / "policy" / f"v{reference.version}-{reference.fingerprint[:12]}"


def _write_page(recipe: Recipe, result: BuildResult, folder: Path) -> Path:
    """Write the page about the weights, with the training of the policy where matplotlib is there to draw it."""
    from tokenizers import Tokenizer

    from train.plots import draw_runs
    from weights_store.inspection.page import render

    tokenizer = Tokenizer.from_file(f"{recipe.model.path}/tokenizer.json")
    name = f"{result.published.name}@{result.published.weights.version}"
    view: View = WeightStore(recipe.store.uri).view(name, tokenizer=tokenizer)
    if find_spec("matplotlib") is not None:
        figure = draw_runs([_policy_folder(result, folder)], "svg").decode()
        view = replace(view, plots=[("The training on these weights", figure)])
    write_whole(folder / "page.html", render(view))
    return folder / "page.html"


def _train_policy(recipe: Recipe, result: BuildResult, folder: Path) -> Result:
    """Train on the published version, in a process of its own as a trainer would; return metrics before and after."""
    reference, output = result.published.weights, _policy_folder(result, folder)
    arguments = ["train", "--store", recipe.store.uri, "--model", recipe.model.path, "--output", str(output)]
    arguments += ["--weights", f"{result.published.name}@{reference.version}", *_set(_POLICY_SETTINGS)]
    run_child("tokenweights", arguments, "training the policy")
    return cast(Result, load_json(output / "metrics.json"))


def _compare(recipe: Recipe, result: BuildResult, folder: Path) -> dict[str, Points]:
    """Return the points of three policies, see `pipeline/toy/compare.py`; they are kept in a file for the next run."""
    reference = result.published.weights
    output = folder / f"v{reference.version}-{reference.fingerprint[:12]}.json"
    found: dict[str, Any] = load_json(output) if output.is_file() else {}
    if found.get("settings") != SETTINGS:
        folder.mkdir(exist_ok=True)
        weights = f"{result.published.name}@{reference.version}"
        run_child(
            "pipeline.toy.compare", [recipe.store.uri, weights, recipe.model.path, str(output)], "comparing policies"
        )
        found = load_json(output)
    return cast(dict[str, Points], found["policies"])


def _agreement(recipe: Recipe, result: BuildResult) -> dict[str, float]:
    """Compare the score behind the weight of every response token with its true reward.

    A weight is exp(score) on chosen tokens and exp(-score) on rejected ones.
    """
    from tokenizers import Tokenizer  # not AutoTokenizer: transformers takes seconds to import

    store = WeightStore(recipe.store.uri)
    tokenizer = Tokenizer.from_file(f"{recipe.model.path}/tokenizer.json")
    weights = store.scan(result.published.name, result.published.weights.version)
    tokens = store.table(result.prepared.tokens.table).scan(result.prepared.tokens.version).select("pair_id", "prompt")
    rewards, scores = [], []
    for row in weights.join(tokens, on="pair_id").collect().iter_rows(named=True):
        prompt = json.loads(row["prompt"])["messages"][-1]["content"]
        for side, sign in zip(SIDES, (1, -1), strict=True):
            texts = tokenizer.decode_batch([[token_id] for token_id in row[f"{side}_ids"]], skip_special_tokens=False)
            rewards.append(DEMO_LANGUAGE.true_token_rewards(prompt, texts))
            scores.append(sign * np.log(row[f"{side}_token_weights"]))
    return agreement(np.concatenate(rewards), np.concatenate(scores))


def _print_table(result: BuildResult, metrics: Result, found: dict[str, float]) -> None:
    statistics = result.published.statistics
    before, after = metrics["before"], metrics["after"]
    rows = [
        ("pairs", f"{statistics['num_pairs']:,}"),
        ("response tokens", f"{statistics['num_response_tokens']:,}"),
        ("versions", f"{result.prepared.tokens}, {result.published.weights}"),
        (
            "trained on",
            f"{metrics['steps']} steps; the next three on {metrics['num_sample_pairs']} of the training pairs",
        ),
        ("loss", f"{before['loss']:.4f} -> {after['loss']:.4f}"),
        ("reward margin", f"{before['rewards/margins']:+.4f} -> {after['rewards/margins']:+.4f}"),
        ("reward accuracy", f"{before['rewards/accuracies']:.1%} -> {after['rewards/accuracies']:.1%}"),
        ("scores", f"correlation {found['pearson']:.2f} with the true rewards, over all response tokens"),
        *(
            (
                f"  {kind} tokens",
                f"{found[f'mean_{kind}']:+.2f} ± {found[f'std_{kind}']:.2f} (mean, standard deviation)",
            )
            for kind in ("good", "neutral", "bad")
        ),
        *held_out_lines(statistics),
    ]
    width = max(len(label) for label, _ in rows)
    print()
    for label, value in rows:
        print(f"  {label:<{width}}  {value}")
