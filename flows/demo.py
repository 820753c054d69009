"""The demo: the main job on a made-up language whose true token rewards are known.

Makes a small model and pairs, builds the contrastive pair by DPO (construction D), scores with vLLM, publishes weights, trains
a weighted-DPO policy, and says how well the weights find the planted good and bad tokens. A second run reuses everything.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flows.build import BuildResult
from flows.run import run_build
from pipeline.child import run_child
from pipeline.recipe import Recipe
from pipeline.source.chat import ChatTokenizer
from pipeline.toy.language import ToyLanguage, agreement
from pipeline.toy.model_maker import make_chat_model
from weights_store import WeightStore
from weights_store.location import write_whole
from weights_store.settings import parse_settings

_NUM_PAIRS = 1000
_NUM_CONVERSATIONS = 6000
_POLICY_SETTINGS = {
    "loss.name": "tis_dpo",
    "loss.beta": 0.1,
    "optim.learning_rate": 3e-4,
    "optim.num_epochs": 1,
    "optim.pairs_per_step": 32,
    "optim.tokens_per_batch": 4096,
}


def run_demo(folder: str | Path, debug: bool = False) -> None:
    """Run the whole job in `folder` and print a short table.

    Raises:
        TokenweightsError: A stage failed.
    """
    started = time.monotonic()
    folder = Path(folder)
    language = ToyLanguage()
    _say("1/4 model and pairs")
    _make_model(folder / "model", language)
    _make_pairs(folder / "pairs.jsonl", language)
    _say("2/4 build: contrastive pair, scores, weights")
    recipe = _recipe(folder)
    result = run_build(recipe, debug=debug)
    _say("3/4 train a weighted-DPO policy")
    metrics = _train_policy(recipe, result, folder / "policy")
    _say("4/4 how well do the weights find the planted tokens?")
    found = _agreement(recipe, result, language)
    _print_table(result, metrics, found)
    print(f"\nstore:  {recipe.store.uri}\npolicy: {folder / 'policy'}\nreport: {result.report}")
    print(f"done in {time.monotonic() - started:.0f} s")


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _make_model(folder: Path, language: ToyLanguage) -> None:
    if folder.is_dir():
        print(f"model: {folder} is there already")
        return
    make_chat_model(language.sample_conversations(_NUM_CONVERSATIONS, seed=1), folder)


def _make_pairs(path: Path, language: ToyLanguage) -> None:
    if path.is_file():
        print(f"pairs: {path} is there already")
        return
    pairs = language.sample_pairs(_NUM_PAIRS, seed=2)
    write_whole(path, "".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"pairs: {len(pairs)} in {path}")


def _recipe(folder: Path) -> Recipe:
    settings = {
        "dataset": {"name": "toy", "source": str(folder / "pairs.jsonl")},
        "model": {"path": str(folder / "model")},
        "contrast": {
            "method": "dpo",
            "learning_rate": 1e-3,
            "num_epochs": 2,
            "pairs_per_step": 32,
            "tokens_per_batch": 4096,
        },
        "score": {"kv_cache_gib": 1.0},
        "weights": {"name": "toy/tis-dpo"},
        "store": {"uri": str(folder / "store")},
    }
    return parse_settings(Recipe, settings, "the demo's recipe")


def _train_policy(recipe: Recipe, result: BuildResult, output: Path) -> dict[str, Any]:
    """Train on the published version, in a process of its own as a trainer would; return its metrics before and after."""
    reference = result.published.weights
    output = output / f"v{reference.version}-{reference.fingerprint[:12]}"
    arguments = ["train", "--store", recipe.store.uri, "--model", recipe.model.path]
    arguments += ["--weights", f"{result.published.name}@{reference.version}", "--output", str(output)]
    for key, value in _POLICY_SETTINGS.items():
        arguments += ["--set", f"{key}={json.dumps(value)}"]
    run_child("tokenweights", arguments, "training the policy")
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def _agreement(recipe: Recipe, result: BuildResult, language: ToyLanguage) -> dict[str, float]:
    """Compare log pi+ - log pi- of every response token with its true reward."""
    store = WeightStore(recipe.store.uri)
    tokens, *logps = (
        store.table(reference.table).scan(reference.version)
        for reference in (result.prepared.tokens, result.scored["positive"].output, result.scored["negative"].output)
    )
    for role, frame in zip(("positive", "negative"), logps, strict=True):
        renamed = frame.rename({"chosen_logps": f"chosen_{role}", "rejected_logps": f"rejected_{role}"})
        tokens = tokens.join(renamed, on="pair_id")
    tokenizer = ChatTokenizer(Path(recipe.model.path))
    rewards, estimates = [], []
    for row in tokens.select(pl.exclude("prompt_ids")).collect().iter_rows(named=True):
        prompt = json.loads(row["prompt"])[-1]["content"]
        for side in ("chosen", "rejected"):
            rewards.append(language.true_token_rewards(prompt, tokenizer.token_texts(row[f"{side}_ids"])))
            estimates.append(np.array(row[f"{side}_positive"]) - np.array(row[f"{side}_negative"]))
    return agreement(np.concatenate(rewards), np.concatenate(estimates))


def _print_table(result: BuildResult, metrics: dict[str, Any], found: dict[str, float]) -> None:
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
        ("planted tokens found", f"AUC {found['auc']:.3f} (0.5 is chance), correlation {found['pearson']:.3f}"),
        (
            "mean log pi+/pi-",
            f"good {found['mean_good']:+.3f}, neutral {found['mean_neutral']:+.3f}, bad {found['mean_bad']:+.3f} nats",
        ),
    ]
    width = max(len(label) for label, _ in rows)
    print()
    for label, value in rows:
        print(f"  {label:<{width}}  {value}")
