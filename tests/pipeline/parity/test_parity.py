"""The engine against transformers over architectures, made here with random weights; and the parity check itself.

Log-probs of random weights lie several nats apart, so that a wrong scale, a forgotten soft-cap or a shift by one shows: what
each would do is worked out by transformers, and has to be far outside the tolerance.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

import tokenweights
from pipeline.parity.check import (
    Gap,
    Parity,
    check_parity,
    check_scorer,
    check_stored,
    compare,
    parity_lines,
    role_scorer,
)
from pipeline.parity.process import Column, run, score_with_transformers
from pipeline.parity.sample import Sample, take_sample
from pipeline.recipe import Recipe
from pipeline.stages.prepare import Preparation, prepare
from pipeline.workers.pair_row import PairRow, read_pairs, under_condition
from weights_store import WeightStore
from weights_store.errors import DamageError, InputError, MismatchError
from weights_store.schemas import LOGPS, SIDES, WEIGHTS
from weights_store.settings import parse_settings

MEAN_NATS, MAX_NATS = 1e-3, 1e-2
WAYS = ("response_rows", "flat")
SIZES = {  # heads of 32 dimensions: the least that vLLM's attention on CPUs takes
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 16}  # neither the head's size nor longer than the sequences
ARCHITECTURES = {
    "llama-untied": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**GEMMA, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
}
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# All models in one process, which binds threads and memory for good; and what vLLM says which ids it was given.
SCRIPT = """
import gc, json, sys
from pathlib import Path
from pipeline.engine.request_queue import RequestQueue
from pydantic import TypeAdapter
from pipeline.parity.process import Task, run

outputs_of_engine, seen = RequestQueue._outputs, []

def watched(self):
    outputs = outputs_of_engine(self)
    seen.extend(output.prompt_token_ids for output in outputs)
    return outputs

RequestQueue._outputs = watched
result = {}
for name, task in json.loads(Path(sys.argv[1]).read_text()).items():
    columns = run(TypeAdapter(Task).validate_python({"side": "engine", **task}))
    result[name] = {"columns": {way: vars(column) for way, column in columns.items()}, "seen": seen[:]}
    seen.clear()
    gc.collect()
Path(sys.argv[2]).write_text(json.dumps(result))
"""


# --- models ------------------------------------------------------------------------------------------------------------


def _make_model(name, folder, vocab_size):
    """Random weights with logits a few nats apart; norms and biases that are no identity."""
    family, settings = ARCHITECTURES[name]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(vocab_size=vocab_size, **{**SIZES, **settings})
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    norm_mean = 0.0 if family.startswith("Gemma") else 1.0  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.normal_(norm_mean, 0.2)
            elif "embed" in key or "lm_head" in key:
                parameter.normal_(0.0, 0.3)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(0.0, 0.5)
    model.save_pretrained(folder)


def _make_gemma_tokenizer(texts):
    """A tokenizer that, like Gemma's, puts <bos> in front of whatever it tokenises, besides the one of its template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", chat_template=GEMMA_TEMPLATE
    )
    assert tokenizer("x")["input_ids"][0] == 2
    return tokenizer


def _recipe(folder, model, pairs_file, **sections):
    settings = {
        "dataset": {"name": "toy", "source": str(pairs_file)},
        "model": {"path": str(model)},
        "score": {"kv_cache_gib": 1.0},
        "weights": {"name": "toy/tis-dpo", "estimator": "tis"},
        "store": {"uri": str(folder / "store")},
        **sections,
    }
    return parse_settings(Recipe, settings, "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory, toy_model, toy_pairs, write_jsonl):
    """By architecture: the folder of its model, and rows of the tokens table of toy pairs cut by its tokenizer."""
    folder = tmp_path_factory.mktemp("parity")
    write_jsonl(folder / "pairs.jsonl", toy_pairs[:12])
    texts = [str(pair["chosen"]) for pair in toy_pairs]
    plain, gemma = transformers.AutoTokenizer.from_pretrained(toy_model), _make_gemma_tokenizer(texts)
    result = {}
    for name in ARCHITECTURES:
        tokenizer = gemma if name.startswith("gemma") else plain
        vocab_size = len(tokenizer) + 7 + (len(tokenizer) + 7) % 2  # the model knows ids that the tokenizer never gives
        vocab_size += 3 if vocab_size % 64 == 0 else 0
        _make_model(name, folder / name, vocab_size)
        tokenizer.save_pretrained(folder / name)
        recipe = _recipe(folder / f"of-{name}", folder / name, folder / "pairs.jsonl")
        prepare(recipe, folder / name)
        result[name] = folder / name, take_sample(Preparation.of(recipe, folder / name), 12)
    return result


@pytest.fixture(scope="module")
def scored(made, tmp_path_factory):
    """By architecture: what the engine made of its rows in each way, and the ids that reached it."""
    folder = tmp_path_factory.mktemp("scored")
    engine = {"dtype": "float32", "kv_cache_gib": 1.0, "batch_tokens": 256}
    tasks = {
        name: {
            "side": "engine",
            "model": str(model),
            "pairs": [asdict(pair) for pair in sample.pairs],
            "engine": engine,
            "ways": WAYS,
        }
        for name, (model, sample) in made.items()
    }
    (folder / "tasks.json").write_text(json.dumps(tasks))
    command = [sys.executable, "-c", SCRIPT, str(folder / "tasks.json"), str(folder / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@torch.no_grad()
def _oracle(folder, sample, change=lambda model: None, **settings):
    """Log-probs of all response tokens, `[num_tokens]`, by a transformers model that may have been tampered with."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **settings
    )
    change(model.eval())
    logps = []
    for pair in sample.pairs:
        for response_ids in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + response_ids])
            of_next = model(ids).logits[0, :-1].log_softmax(-1)
            logps.append(of_next.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(pair.prompt_ids) - 1 :])
    return torch.cat(logps).numpy()


@pytest.fixture(scope="module")
def expected(made):
    """By architecture: what transformers makes of its rows, `[num_tokens]` nats."""
    return {name: _oracle(*made[name]) for name in ARCHITECTURES}


def _flat(column, sample):
    return np.concatenate([np.array(side) for pair in sample.pairs for side in column["logps"][pair.pair_id]])


# --- architectures -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_way_agrees_with_transformers(made, scored, expected, name):
    _, sample = made[name]
    assert expected[name].std() > 1.0
    for way in WAYS:
        column = scored[name]["columns"][way]
        assert (column["failed"], column["unscorable"]) == (None, {})
        difference = np.abs(_flat(column, sample) - expected[name])
        assert difference.mean() < MEAN_NATS
        assert difference.max() < MAX_NATS


def _tie(model):
    model.lm_head.weight = model.get_input_embeddings().weight


def _fill(model, name, value):
    found = [parameter for key, parameter in model.named_parameters() if re.search(name, key)]
    assert found
    for parameter in found:
        parameter.fill_(value)


def _scale_embeddings(model, by):
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * by)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama-untied", {"change": _tie}),
        ("llama-tied", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("qwen2", {"change": partial(_fill, name=r"\.bias$", value=0.0)}),
        ("qwen3", {"change": partial(_fill, name=r"[qk]_norm", value=1.0)}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 4096}),
        ("gemma2", {"query_pre_attn_scalar": SIZES["head_dim"]}),
        ("gemma2", {"change": partial(_scale_embeddings, by=SIZES["hidden_size"] ** -0.5)}),
        ("gemma3", {"sliding_window": 4096}),
        ("gemma3", {"change": partial(_scale_embeddings, by=SIZES["hidden_size"] ** -0.5)}),
    ],
)
def test_what_the_engine_might_get_wrong_is_far_outside_the_tolerance(made, expected, name, wrong):
    difference = np.abs(_oracle(*made[name], **wrong) - expected[name])
    assert difference.mean() > 10 * MEAN_NATS
    assert difference.max() > 10 * MAX_NATS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_of_neighbouring_tokens_are_far_apart(expected, name):
    assert np.abs(np.diff(expected[name])).mean() > 1.0  # a shift by one


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vocabulary_is_padded_and_larger_than_the_tokenizers(made, name):
    folder, _ = made[name]
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert vocab_size % 64 != 0
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) < vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_ids_that_reach_the_engine_are_those_of_the_table(made, scored, name):
    _, sample = made[name]
    wanted = {tuple(pair.prompt_ids + ids) for pair in sample.pairs for ids in (pair.chosen_ids, pair.rejected_ids)}
    assert {tuple(ids) for ids in scored[name]["seen"]} == wanted


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_template_with_bos_and_a_tokenizer_that_adds_it_make_one_bos(made, name):
    folder, sample = made[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for pair in sample.pairs:
        assert pair.prompt_ids[0] == tokenizer.bos_token_id
        ids = pair.prompt_ids + pair.chosen_ids + pair.rejected_ids
        assert ids.count(tokenizer.bos_token_id) == 1
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == end_of_turn
        assert tokenizer.decode(pair.prompt_ids).endswith("<start_of_turn>model\n")


@pytest.mark.parametrize("name", ["llama-untied", "gemma2"])
def test_the_checks_own_transformers_side_is_the_plain_one(made, expected, name):
    folder, sample = made[name]
    column = score_with_transformers(folder, sample.pairs)
    assert column.unscorable == {}
    np.testing.assert_allclose(_flat(vars(column), sample), expected[name], rtol=0, atol=1e-4)


# --- the comparison, by hand -------------------------------------------------------------------------------------------

SAMPLE = Sample(
    "somewhere",
    [
        PairRow("a", 0, "[]", prompt_ids=[1], chosen_ids=[7, 8], rejected_ids=[9]),
        PairRow("b", 1, "[]", prompt_ids=[1], chosen_ids=[7], rejected_ids=[8, 9]),
    ],
)
EXPECTED = Column({"a": [[-1.0, -2.0], [-3.0]], "b": [[-1.0], [-2.0, -4.0]]})


def _parity(column, expected=EXPECTED, tolerance_nats=0.5, absent=None):
    agreements = {} if column is None else {"flat": compare(SAMPLE, column, expected)}
    return Parity(SAMPLE, "ref (m) in float32", tolerance_nats, agreements, absent or {}, expected.unscorable)


def test_agreement_is_mean_percentiles_and_the_worst_token():
    agreement = compare(SAMPLE, Column({"a": [[-1.5, -2.0], [-3.0]], "b": [[-1.0], [-2.0, -3.0]]}), EXPECTED)
    # |differences| are 0.5, 0, 0, 0, 0, 1: mean 1.5 / 6; the 90th percentile lies halfway between 0.5 and 1 (0.9 * 5 = 4.5).
    assert (agreement.num_tokens, agreement.mean, agreement.max) == (6, 0.25, 1.0)
    assert agreement.percentiles[:2] == (0.0, 0.75)
    assert agreement.worst == Gap("b", "rejected", 1, 9, -3.0, -4.0)
    assert agreement.passes(0.25)
    assert not agreement.passes(0.24)
    assert not compare(SAMPLE, Column({"a": [[-1.0, -2.0], [-3.6]], "b": EXPECTED.logps["b"]}), EXPECTED).passes(0.01)


def test_a_way_out_of_bounds_is_refused_with_its_worst_token():
    parity = _parity(Column({"a": [[-1.0, -2.0], [-33.0]]}), tolerance_nats=11)
    check_parity(parity)  # mean 10 of 3 tokens
    with pytest.raises(
        MismatchError, match=r"flat differs .* by 10 nats in the mean \(expected at most 9\) and 30 at most"
    ):
        check_parity(_parity(Column({"a": [[-1.0, -2.0], [-33.0]]}), tolerance_nats=9))
    with pytest.raises(MismatchError, match=r"farthest apart: pair a, rejected, response token 0 \(id 9\): -33.0"):
        check_parity(_parity(Column({"a": [[-1.0, -2.0], [-33.0]]}), tolerance_nats=9))


def test_a_nan_is_no_agreement():
    parity = _parity(Column({"a": [[-1.0, -2.0], [float("nan")]]}))
    assert not parity.agreements["flat"].passes(0.5)
    with pytest.raises(MismatchError, match="by nan nats"):
        check_parity(parity)


def test_nothing_compared_is_no_agreement():
    with pytest.raises(MismatchError, match="nothing to compare, no pair has log-probs of both: too long"):
        check_parity(_parity(Column(unscorable={"a": "too long", "b": "too long"})))
    with pytest.raises(MismatchError, match="no way of the engine works here: no memory"):
        check_parity(_parity(None, absent={"flat": "no memory"}))


def test_log_probs_of_another_number_of_tokens_are_refused():
    with pytest.raises(
        MismatchError, match="pair a, chosen: 2 tokens, 1 log-probs by the engine and 2 by transformers"
    ):
        compare(SAMPLE, Column({"a": [[-1.0], [-3.0]]}), EXPECTED)


def test_lines_show_each_way_what_is_absent_and_what_was_not_scored():
    column = Column({"a": [[-1.0, -2.0], [-3.25]]}, unscorable={"b": "too long"})
    text = "\n".join(parity_lines(_parity(column, absent={"response_rows": "no hook"})))
    assert "2 pairs, 6 response tokens, of somewhere" in text
    assert re.search(r"^flat +8\.3e-02 .* 2\.5e-01 +3 +1  passes$", text, re.MULTILINE)
    assert "response_rows  not here: no hook" in text
    assert "farthest off by flat: pair a, rejected, response token 0 (id 9): -3.25000, transformers -3.00000" in text
    assert "not scored by flat: pair b: too long" in text


# --- the check ---------------------------------------------------------------------------------------------------------


def test_sample_of_the_source_is_what_prepare_makes_of_it(tmp_path, toy_model, toy_pairs, write_jsonl):
    write_jsonl(tmp_path / "pairs.jsonl", [b"no json", {"chosen": "x", "rejected": "x"}, *toy_pairs[:5]])
    recipe = _recipe(tmp_path, toy_model, tmp_path / "pairs.jsonl")
    start = Preparation.of(recipe, toy_model)
    of_source = take_sample(start, 4)
    assert of_source.origin == f"the first rows of {tmp_path / 'pairs.jsonl'}"
    assert [pair.source_row for pair in of_source.pairs] == [2, 3, 4, 5]
    prepare(recipe, toy_model)
    of_table = take_sample(start, 100)
    assert of_table.origin == f"{start.tokens.path}@0"
    assert [pair.pair_id for pair in of_table.pairs] == sorted(pair.pair_id for pair in of_table.pairs)
    of_table_by_id = {pair.pair_id: pair for pair in of_table.pairs}
    assert [of_table_by_id[pair.pair_id] for pair in of_source.pairs] == of_source.pairs
    assert take_sample(start, 2).pairs == of_table.pairs[:2]


def test_source_without_a_usable_row_is_refused(tmp_path, toy_model, toy_pairs, write_jsonl):
    write_jsonl(tmp_path / "pairs.jsonl", [{**toy_pairs[0], "rejected": toy_pairs[0]["chosen"]}])
    recipe = _recipe(tmp_path, toy_model, tmp_path / "pairs.jsonl")
    with pytest.raises(InputError, match="no row of it can be used"):
        check_scorer(recipe)


def test_model_that_is_yet_to_be_trained_is_refused(tmp_path, toy_model, toy_pairs, write_jsonl):
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:2])
    recipe = _recipe(tmp_path, toy_model, tmp_path / "pairs.jsonl", contrast={"method": "dpo"})
    with pytest.raises(InputError, match=r"the negative model \(contrast.method dpo\) is not in .* yet; train it with"):
        check_scorer(recipe, role="negative")


def test_contrastive_scorer_is_checked_behind_its_prompt(tmp_path, toy_model, toy_pairs, write_jsonl):
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:6])
    contrast = {"method": "prompt", "positive_prompt": "be good", "negative_prompt": "be bad"}
    recipe = _recipe(tmp_path, toy_model, tmp_path / "pairs.jsonl", contrast=contrast)
    start = Preparation.of(recipe, toy_model)
    plain = take_sample(start, 6).pairs
    assert role_scorer(recipe, toy_model, "ref").condition is None
    conditioned = under_condition(plain, role_scorer(recipe, toy_model, "negative").condition, start.tokenizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy_model)
    for before, after in zip(plain, conditioned, strict=True):
        assert "be bad" in tokenizer.decode(after.prompt_ids)
        assert after == replace(before, prompt_ids=after.prompt_ids)


@pytest.mark.slow
def test_command_prints_the_table_and_fails_above_the_tolerance(tmp_path, toy_model, toy_pairs, write_jsonl, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:4])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"[dataset]\nname = 'toy'\nsource = {json.dumps(str(tmp_path / 'pairs.jsonl'))}\n"
        f"[model]\npath = {json.dumps(str(toy_model))}\n[contrast]\nmethod = 'prompt'\n[score]\nkv_cache_gib = 1.0\n"
        "[weights]\nname = 'toy/tis-dpo'\nestimator = 'tis'\n"
    )
    options = ["--store", str(tmp_path / "store"), "--pairs", "3", "--role", "positive", "--tolerance", "1e-12"]
    code = tokenweights.main(["check-scorer", str(recipe), *options])
    out, err = capsys.readouterr()
    assert code == 1
    assert out.startswith("3 pairs, ")
    assert f"scorer positive ({toy_model}) in float32" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(WAYS)}
    assert [rows[way][-1] for way in WAYS] == ["FAILS", "FAILS"]
    assert all(0 < float(rows[way][1]) < MEAN_NATS for way in WAYS)  # the tolerance was out of reach
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "response_rows differs from transformers by" in errors[0]
    assert err.splitlines()[-1] == errors[0]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("option", [["--pairs", "0"], ["--tolerance", "-1"], ["--role", "best"]], ids=" ".join)
def test_wrong_usage_of_the_command_is_exit_code_2(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        tokenweights.main(["check-scorer", "recipe.toml", *option])
    assert "expected" in capsys.readouterr().err or option[0] == "--role"


# --- what is stored ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path, toy_model, toy_pairs, write_jsonl, monkeypatch):
    """A recipe, its tokens, a function that stores reference log-probs off by so many nats, and one that checks them here."""
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:6])
    recipe = _recipe(tmp_path, toy_model, tmp_path / "pairs.jsonl")
    tokens = prepare(recipe, toy_model).tokens
    store, ran = WeightStore(tokens.store), []
    expected = score_with_transformers(toy_model, read_pairs(store.table(tokens.table).scan().collect()))

    def write(off_nats):
        rows = [
            {
                "pair_id": pair_id,
                **{f"{side}_logps": np.array(v) - off_nats for side, v in zip(SIDES, values, strict=True)},
            }
            for pair_id, values in expected.logps.items()
        ]
        table = store.table("logps/toy-1/ref")
        return table.replace(pa.Table.from_pylist(rows, LOGPS), {"fingerprint": f"off {off_nats}"})

    def check(ref, max_tokens=2048, **score):
        changed = recipe.model_copy(update={"score": recipe.score.model_copy(update=score)})
        return check_stored(changed, tokens, ref, toy_model, max_tokens)

    def run_here(task, _python):
        ran.append([pair.pair_id for pair in task.pairs])
        return run(task)

    monkeypatch.setattr(
        "pipeline.parity.check.run_task", run_here
    )  # a process of its own costs seconds; builds have one
    return SimpleNamespace(
        store=store, tokens=tokens, write=write, check=check, ran=ran, pair_ids=sorted(expected.logps)
    )


def test_stored_log_probs_that_agree_are_recorded_with_their_rounding(stored):
    found = stored.check(stored.write(2**-12))["parity"]
    rows = stored.store.table(stored.tokens.table).scan().collect()
    num_tokens = sum(rows[f"{side}_ids"].list.len().sum() for side in SIDES)
    assert (found["num_pairs"], found["num_tokens"], found["dtype"]) == (6, num_tokens, "float32")
    # Off by 2.4e-4, and rounded to 12 bits: a log-prob above -16 moves by less than 8 * 2**-12 nats then, mostly by far less.
    assert found["mean"] == pytest.approx(2**-12, abs=2e-4)
    assert found["mean"] < found["p99"] <= found["max"] < 1e-2


def test_stored_log_probs_that_differ_are_refused(stored):
    with pytest.raises(
        MismatchError,
        match=r"^logps/toy-1/ref@0 differs from transformers by 0\.5 nats in the mean \(expected at most 0\.001\).*"
        r"farthest apart: pair .* Nothing was published\. .*score.parity_pairs=0",
    ):
        stored.check(stored.write(0.5))
    assert stored.check(stored.write(0.5), parity_pairs=0) == {}


def test_the_sample_of_a_build_is_the_pairs_with_the_lowest_ids_that_are_short_enough(stored, logged):
    ref = stored.write(0.0)
    stored.check(ref, parity_pairs=2)
    assert stored.ran.pop() == stored.pair_ids[:2]
    rows = stored.store.table(stored.tokens.table).scan().collect()
    lengths = {
        row["pair_id"]: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in rows.to_dicts()
    }
    stored.check(ref, max_tokens=max(lengths.values()) - 1)
    assert stored.ran.pop() == [pair_id for pair_id in stored.pair_ids if lengths[pair_id] < max(lengths.values())]
    assert stored.check(ref, max_tokens=3) == {}
    assert logged.lines[-1:] == ["logps/toy-1/ref@0: not compared with transformers: no pair has at most 3 tokens"]
    assert stored.ran == []


@pytest.mark.parametrize("name", ["toy/uniform", "toy/tis-dpo", "other/name"])
def test_a_check_that_a_version_has_recorded_of_the_same_log_probs_is_not_repeated(stored, name):
    ref = stored.write(0.5)
    metadata = {"fingerprint": "w", "parents": [{"role": "ref_logps", **ref.as_parent()}], "parity": {"mean": 7.0}}
    stored.store.table(f"weights/{name}").append(WEIGHTS.empty_table(), metadata)
    assert stored.check(ref) == {"parity": {"mean": 7.0}}
    with pytest.raises(MismatchError, match="differs"):
        stored.check(stored.write(0.25))  # other log-probs
    assert len(stored.ran) == 1


def test_damage_to_another_dataset_does_not_stop_the_check(stored):
    table = stored.store.table("weights/a/damaged")
    table.append(WEIGHTS.empty_table(), {"fingerprint": "w"})
    log = table.location.path / f"_delta_log/{0:020d}.json"
    log.write_text(log.read_text().replace('"fingerprint', '"fingerprimt'))
    with pytest.raises(DamageError):
        table.metadata()
    assert stored.check(stored.write(0.0))["parity"]["num_pairs"] == 6


def test_an_interpreter_without_transformers_is_said_in_one_line_and_nothing_recorded(
    tmp_path, toy_model, toy_pairs, write_jsonl, logged
):
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:2])
    bare = tmp_path / "python"
    bare.write_text(
        f"#!{sys.executable}\nimport runpy, sys\nsys.modules['torch'] = None\nsys.argv = sys.argv[3:]\n"
        "runpy.run_module('pipeline.parity.process', run_name='__main__', alter_sys=True)\n"
    )
    bare.chmod(0o755)
    recipe = _recipe(tmp_path, toy_model, tmp_path / "pairs.jsonl", score={"python": str(bare)})
    tokens = prepare(recipe, toy_model).tokens
    pair_ids = WeightStore(tokens.store).table(tokens.table).pair_ids()
    rows = pa.Table.from_pylist(
        [{"pair_id": i, "chosen_logps": [-1.0], "rejected_logps": [-1.0]} for i in pair_ids], LOGPS
    )
    ref = WeightStore(tokens.store).table("logps/toy-1/ref").append(rows, {"fingerprint": "ref"})
    assert check_stored(recipe, tokens, ref, toy_model) == {}
    assert re.fullmatch(
        "logps/toy-1/ref@0: not compared with transformers: .*it has no package 'torch'.*", logged.lines[-1]
    )
