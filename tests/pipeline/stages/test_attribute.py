"""The stage that attributes: rows of the tokens table in, gradients of a tiny model out, and what happens when it breaks."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import pipeline.workers.pair_attributor
from pipeline.engine.contract import EngineSettings
from pipeline.stage_sections import AttributeSection
from pipeline.stages.attribute import attribute, attribution_identity
from pipeline.workers.on_ray import Chunk, ChunkScorer, replies
from pipeline.workers.pair_attributor import PairAttributor
from pipeline.workers.pair_row import read_pairs
from pipeline.workers.process import fill
from pipeline.workers.request import AttributionOptions, Executor, Request, Target
from tests.pipeline.stages.test_score import NUM_PAIRS, PAIR_TOKENS, make_tokens
from tests.train.model.families import make_model
from train.data.dataset import Pair, StoredResponse
from train.model.attention.continuation import KeptPrompts
from train.model.attribution import attribute_tokens
from train.model.collate import PairCollator
from weights_store import WeightStore
from weights_store.checks.verify import verify
from weights_store.errors import InputError, OutOfMemoryError
from weights_store.schemas import ATTRIBUTIONS, SIDES, Reason

VOCAB_SIZE, POISON = 1000, 950  # the made-up pairs have ids from 3 to 899


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama in float32, whose embedding of one id is not a number."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=60,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data[POISON] = torch.nan
    folder = tmp_path_factory.mktemp("attributed")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make_request(tmp_path, model_folder):
    """Return a function that makes tokens and a request over them: `make_request(target="gold_logps", row3={...})`."""

    def make(batch_tokens=256, dtype="float32", chunk_tokens=40 * PAIR_TOKENS, model=model_folder, **changed):
        options = {"target": "max_logit", "prompts": False, "activations": False, "contexts": 0}
        options |= {name: changed.pop(name) for name in list(changed) if name in options}
        tokens = make_tokens(tmp_path / "store", **changed)
        metadata = {"fingerprint": "attributions", "inputs": [str(tokens)]}
        target = Target("ref", "attributions/toy-1/x", None, metadata)
        engine = EngineSettings(dtype, batch_tokens)
        options = AttributionOptions(**options)
        return Request("attribute", tokens, str(model), [target], chunk_tokens, engine, options=options)

    return make


def rows_in(request):
    tokens = request.tokens
    return WeightStore(tokens.store).table(tokens.table).scan(tokens.version).sort("pair_id").collect()


def pairs_in(request):
    return read_pairs(rows_in(request))


def filled(request):
    return WeightStore(request.tokens.store).table(request.targets[0].table).scan().sort("pair_id").collect()


def run(request, progress=lambda share: None):
    worker = PairAttributor(request)
    return worker.fill_in(pairs_in(request), request.targets[0], progress)


@pytest.fixture(scope="module")
def naive(model_folder):
    """Return a function that attributes one sequence: embeddings in, whole logits out, plain autograd."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()

    def attribute_one(prompt_ids, response_ids, target):
        ids = torch.tensor([[*prompt_ids, *response_ids]])
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits[0]
        gold = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :]
        value = logits[-1].max() if target == "max_logit" else gold.sum()
        return torch.autograd.grad(value, embeddings)[0][0].abs().sum(-1).numpy()

    return attribute_one


def test_a_response_is_attributed_alone_as_in_a_pair(make_request):
    request = make_request(prompts=True, activations=True, contexts=2)
    worker, pairs = PairAttributor(request), pairs_in(request)[:4]
    alone = [replace(pair, **{f"{SIDES[index % 2]}_ids": []}) for index, pair in enumerate(pairs)]
    (in_pairs, _), (found, refused) = (worker.fill_in(rows, request.targets[0]) for rows in (pairs, alone))
    assert not refused
    for index, (row, wanted) in enumerate(zip(found.to_pylist(), in_pairs.to_pylist(), strict=True)):
        absent, there = SIDES[index % 2], SIDES[1 - index % 2]
        for name in ("attributions", "activations", "contexts"):
            assert row[f"{absent}_{name}"] == []
            np.testing.assert_allclose(row[f"{there}_{name}"], wanted[f"{there}_{name}"], rtol=1e-4, atol=1e-6)
        assert row[f"{absent}_prompt_attribution"] == 0
        assert row[f"{there}_prompt_attribution"] == pytest.approx(wanted[f"{there}_prompt_attribution"], rel=1e-4)


# --- what is stored ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "prompts"),
    [("max_logit", False), ("max_logit", True), ("gold_logps", False), ("gold_logps", True), ("dpo_margin", False)],
)
def test_the_worker_attributes_like_the_naive_loop(make_request, naive, target, prompts):
    """With prompts each response is computed behind its own."""
    request = make_request(target=target, prompts=prompts, row1={"chosen_ids": [5]})
    table, unscorable = run(request)
    assert unscorable == []
    assert table.schema == ATTRIBUTIONS
    pairs = {row["pair_id"]: row for row in rows_in(request).iter_rows(named=True)}
    assert [row["pair_id"] for row in table.to_pylist()] == sorted(pairs)
    for row in table.to_pylist()[:6]:
        pair = pairs[row["pair_id"]]
        for side in ("chosen", "rejected"):
            whole = naive(pair["prompt_ids"], pair[f"{side}_ids"], target)
            np.testing.assert_allclose(row[f"{side}_attributions"], whole[4:], rtol=1e-5)
            of_prompt = row[f"{side}_prompt_attribution"]
            assert of_prompt == pytest.approx(whole[:4].sum(), rel=1e-5) if prompts else of_prompt is None
            assert row[f"{side}_activations"] is None


def test_a_response_that_stands_in_several_pairs_is_computed_once(make_request, naive, monkeypatch):
    """Rows 0 to 2 share prompt and chosen response: 4 distinct responses of 6, in two packed sequences of two."""
    shared = {"prompt_ids": [7, 8, 9, 10], "chosen_ids": [11, 12, 13]}
    request = make_request(row0=shared, row1=shared, row2={**shared, "prompt_ids": [7, 8, 9, 10]})
    worker = PairAttributor(request)
    sizes = []

    def count(model, batch, target, **options):
        sizes.append(len(batch["places"]))
        return attribute_tokens(model, batch, target, **options)

    monkeypatch.setattr(pipeline.workers.pair_attributor, "attribute_tokens", count)
    table, _ = worker.fill_in(pairs_in(request)[:3], request.targets[0])
    assert sizes == [4]
    rows = table.to_pylist()
    assert rows[0]["chosen_attributions"] == rows[1]["chosen_attributions"] == rows[2]["chosen_attributions"]
    pairs = rows_in(request).head(3).to_dicts()
    for row, pair in zip(rows, pairs, strict=True):
        np.testing.assert_allclose(
            row["rejected_attributions"], naive([7, 8, 9, 10], pair["rejected_ids"], "max_logit")[4:], rtol=1e-5
        )


def test_an_odd_number_of_responses_leaves_none_out(make_request, naive):
    shared = {"prompt_ids": [7, 8, 9, 10], "chosen_ids": [11, 12, 13]}
    request = make_request(row0=shared, row1=shared)
    worker = PairAttributor(request)
    table, _ = worker.fill_in(pairs_in(request)[:2], request.targets[0])
    for row, pair in zip(table.to_pylist(), rows_in(request).head(2).to_dicts(), strict=True):
        for side in ("chosen", "rejected"):
            expected = naive([7, 8, 9, 10], pair[f"{side}_ids"], "max_logit")[4:]
            np.testing.assert_allclose(row[f"{side}_attributions"], expected, rtol=1e-5)


def test_the_batch_budget_and_padding_change_nothing(make_request, monkeypatch):
    request = make_request(activations=True)
    expected, _ = run(request)
    small, _ = run(replace(request, engine=replace(request.engine, batch_tokens=1)))
    monkeypatch.setattr(pipeline.workers.pair_attributor, "enable_packing", lambda model, **_: "made up")
    padded, _ = run(request)
    for name in ATTRIBUTIONS.names[1:]:
        for other in (small, padded):
            for got, wanted in zip(other[name].to_pylist(), expected[name].to_pylist(), strict=True):
                assert got is None if wanted is None else got == pytest.approx(wanted, rel=1e-5)
    activations = expected["chosen_activations"].to_pylist()
    np.testing.assert_allclose([np.mean(of_one) for of_one in activations], 1.0, rtol=1e-5)


def test_bfloat16_weights_come_close_and_leave_the_positions_alone(make_request):
    request = make_request()
    exact = run(request)[0]["chosen_attributions"].to_pylist()
    request = replace(request, engine=replace(request.engine, dtype="bfloat16"))
    worker = PairAttributor(request)
    assert {parameter.dtype for parameter in worker._model.parameters()} == {torch.bfloat16}
    assert worker._model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in worker._model.parameters())
    rough = worker.fill_in(pairs_in(request), request.targets[0])[0]["chosen_attributions"].to_pylist()
    difference = np.abs(np.array(rough) - np.array(exact))
    assert 0 < difference.sum() < 0.05 * np.sum(exact)


def test_a_model_that_was_probed_is_the_one_that_transformers_loads(make_request, tmp_path):
    """Gemma computes a scale in the dtype in which it is loaded; other tensors are in float32 whatever that is."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = GemmaConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=1, **sizes)
    GemmaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "gemma")
    request = make_request(model=tmp_path / "gemma", dtype="bfloat16")
    worker, expected = PairAttributor(request), AutoModelForCausalLM.from_pretrained(tmp_path / "gemma", dtype="auto")
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = (dict(getattr(model, kind)()) for model in (worker._model, expected))
        assert {name: tensor.dtype for name, tensor in mine.items()} == {
            name: tensor.dtype for name, tensor in theirs.items()
        }
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_progress_rises_to_all_of_it(make_request):
    shares = []
    run(make_request(), shares.append)
    assert len(shares) > 3
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


# --- what cannot be attributed -----------------------------------------------------------------------------------------


def test_pairs_that_the_model_must_not_see_go_to_quarantine(make_request):
    request = make_request(
        row1={"chosen_ids": [], "rejected_ids": []},
        row2={"rejected_ids": [VOCAB_SIZE]},
        row3={"rejected_ids": [5] * 57},
        row4={"prompt_ids": []},
    )
    table, unscorable = run(request)
    assert table.num_rows == NUM_PAIRS - 4
    assert {row["source_row"]: row["detail"] for row in unscorable} == {
        1: "the prompt or both responses have no tokens",
        2: "a token id is outside the model's vocabulary of 1000",
        3: "prompt and response have 61 tokens, the model takes 60",
        4: "the prompt or both responses have no tokens",
    }
    assert {row["reason"] for row in unscorable} == {Reason.UNSCORABLE.value}


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_that_are_not_finite_cost_their_own_pair_alone(make_request, monkeypatch, padded):
    """The poison stands first in the prompt of the longest pair, whose embedding fills up shorter rows of a packed batch."""
    if padded:
        monkeypatch.setattr(pipeline.workers.pair_attributor, "enable_packing", lambda model, **_: "made up")
    clean, _ = run(make_request())
    longest = {"prompt_ids": [POISON, 4, 5, 6], "chosen_ids": [7, 8, 9, 10, 11, 12, 13, 14]}
    poisoned = {"row5": longest, "row9": {"rejected_ids": [4, POISON, 5, 6, 7]}}
    table, unscorable = run(make_request(**poisoned))
    assert {row["source_row"]: row["detail"] for row in unscorable} == {
        5: "chosen and rejected: gradients are not finite in float32",
        9: "rejected: gradients are not finite in float32",
    }
    kept = clean.filter(pl.Series(range(NUM_PAIRS)).is_in([5, 9]).not_().to_arrow())
    assert table["pair_id"].equals(kept["pair_id"])
    for name in ("chosen_attributions", "rejected_attributions"):
        for got, wanted in zip(table[name].to_pylist(), kept[name].to_pylist(), strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)


def test_a_model_without_input_embeddings_is_refused(make_request, monkeypatch):
    def refuse(self):
        raise NotImplementedError

    monkeypatch.setattr(LlamaForCausalLM, "get_input_embeddings", refuse)
    with pytest.raises(InputError, match="LlamaForCausalLM gives no access to its input embeddings"):
        PairAttributor(make_request())


@pytest.fixture
def family_folder(tmp_path):
    """Return a function that saves a tiny random model of a family."""

    def make(name):
        make_model(name).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("reformer", "ReformerModelWithLMHead does not run on a few ids: AssertionError: .*; use another model"),
        ("rwkv", "RwkvForCausalLM changes its own weights in a forward pass"),
        ("xlnet", "XLNetLMHeadModel: log-probs .* its tokens see what comes after them"),
    ],
)
def test_a_family_whose_code_fails_is_refused_in_one_line(make_request, family_folder, family, message):
    with pytest.raises(InputError, match=message) as error:
        PairAttributor(make_request(model=family_folder(family)))
    assert "\n" not in str(error.value)


def test_activations_of_layers_with_several_states_per_token_are_refused_in_one_line(family_folder):
    folder = family_folder("hy_v4")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sides = [StoredResponse(np.array(ids, np.int32), *np.zeros((2, 2), np.float32)) for ids in ([11, 12], [13, 14])]
    batch = PairCollator(packed=False)([Pair("p", np.array([9, 10], np.int32), *sides)])
    with pytest.raises(
        InputError, match="the layers of HYV4ForCausalLM do not return one state per token, .* attribute.contexts=0$"
    ):
        attribute_tokens(model, batch, "gold_logps", with_activations=True)


def test_responses_are_padded_if_packed_attributions_are_wrong(make_request, naive, monkeypatch):
    """Their log-probs are right, so only the comparison of attributions can tell."""
    ordinary = KeptPrompts.attend

    def swapped(self, module, query, key, value, scoring):
        output = ordinary(self, module, query, key, value, scoring)
        self.kept[-1] = self.kept[-1][::-1]
        return output

    request = make_request()
    assert PairAttributor(request).record["packed"]
    monkeypatch.setattr(KeptPrompts, "attend", swapped)
    worker = PairAttributor(request)
    assert not worker.record["packed"]
    table, _ = worker.fill_in(pairs_in(request), request.targets[0])
    row, pair = table.to_pylist()[0], rows_in(request).row(0, named=True)
    expected = naive(pair["prompt_ids"], pair["chosen_ids"], "max_logit")[4:]
    np.testing.assert_allclose(row["chosen_attributions"], expected, rtol=1e-5)


def test_a_folder_that_is_no_whole_model_is_refused(make_request, model_folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot read the config of the model"):
        PairAttributor(make_request(model=tmp_path))
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    with pytest.raises(InputError, match="transformers cannot load the model"):
        PairAttributor(make_request(model=tmp_path))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_want_of_memory_asks_for_a_smaller_budget(make_request, monkeypatch, error):
    request = make_request()
    worker = PairAttributor(request)

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(pipeline.workers.pair_attributor, "attribute_tokens", fail)
    with pytest.raises(OutOfMemoryError, match="attributing ran out of memory"):
        worker.fill_in(pairs_in(request), request.targets[0])


def test_other_errors_are_not_taken_for_want_of_memory(make_request, monkeypatch):
    request = make_request()
    worker = PairAttributor(request)

    def fail(*args, **options):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(pipeline.workers.pair_attributor, "attribute_tokens", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        worker.fill_in(pairs_in(request), request.targets[0])


# --- contexts ----------------------------------------------------------------------------------------------------------


def test_contexts_are_principal_axes_of_the_states_that_predict_a_token(make_request, model_folder):
    """By a plain forward pass and NumPy; a pair that the model cannot take is not in the sample."""
    request = make_request(contexts=3, row6={"chosen_ids": [VOCAB_SIZE]})
    table, unscorable = run(request)
    assert [row["pair_id"] for row in unscorable] == [f"{6:032x}"]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    pairs, states = [pair for pair in pairs_in(request) if pair.source_row != 6], {}
    for side in ("chosen", "rejected"):
        ids = torch.tensor([[*pair.prompt_ids, *getattr(pair, f"{side}_ids")] for pair in pairs])
        layers = model(ids, output_hidden_states=True).hidden_states
        states[side] = layers[1][:, 3:-1].detach().numpy().astype(np.float64)  # after the first of two layers
    sample = np.concatenate([each.reshape(-1, each.shape[-1]) for each in states.values()])
    mean = sample.mean(0)
    variances, axes = np.linalg.eigh(np.cov(sample.T, bias=True))
    axes = axes[:, ::-1][:, :3] / np.sqrt(variances[-3:].sum())
    of_sample = 0.0
    for side in ("chosen", "rejected"):
        wanted = (states[side] - mean) @ axes
        got = np.array(table[f"{side}_contexts"].to_pylist()).reshape(wanted.shape)
        signs = np.sign((got * wanted).sum((0, 1)))
        np.testing.assert_allclose(got * signs, wanted, atol=2e-4)
        of_sample += (got**2).sum()
    assert of_sample == pytest.approx(len(sample), rel=1e-4)  # mean squared norm 1


def test_contexts_do_not_depend_on_batches_prompts_or_padding(make_request, monkeypatch):
    request = make_request(contexts=4, activations=True)

    def run_few(request):
        worker = PairAttributor(request)
        return worker.fill_in(pairs_in(request)[:8], request.targets[0])[0]

    expected = run_few(request)
    found = [
        run_few(replace(request, engine=replace(request.engine, batch_tokens=1))),
        run_few(replace(request, options=replace(request.options, prompts=True))),
    ]
    monkeypatch.setattr(pipeline.workers.pair_attributor, "enable_packing", lambda model, **_: "made up")
    for other in [*found, run_few(request)]:
        for name in ("chosen_contexts", "rejected_contexts", "chosen_activations"):
            for got, wanted in zip(other[name].to_pylist(), expected[name].to_pylist(), strict=True):
                assert got == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    plain = run_few(make_request(activations=True, contexts=0))
    assert plain["chosen_contexts"].null_count == 8
    assert plain["chosen_activations"].to_pylist()[0] == pytest.approx(
        other["chosen_activations"].to_pylist()[0], rel=1e-4
    )


def test_later_processes_actors_and_pairs_use_the_axes_of_the_first_commit(make_request, model_folder, monkeypatch):
    monkeypatch.setattr(pipeline.workers.pair_attributor, "SAMPLE_PAIRS", 12)
    request = make_request(contexts=4)
    first = PairAttributor(request)  # commits its axes, and is gone
    table = WeightStore(request.tokens.store).table(request.targets[0].table)
    assert (table.version(), table.num_rows()) == (0, 0)
    monkeypatch.setattr(
        pipeline.workers.pair_attributor, "fit_basis", lambda *_: pytest.fail("the axes are there already")
    )
    # Other pairs have the smallest ids by now, and would give other axes.
    changed = make_request(contexts=4, **{f"row{i}": {"prompt_ids": [3, 3, 3, 3]} for i in range(100)})
    second = PairAttributor(changed)
    torch.testing.assert_close(second._basis.axes, first._basis.axes, rtol=0, atol=0)
    torch.testing.assert_close(second._basis.mean, first._basis.mean, rtol=0, atol=0)
    fill(request, request.targets[0], PairAttributor(request))
    assert filled(request).height == NUM_PAIRS
    assert list(verify(WeightStore(request.tokens.store), rows=True)) == []


def test_an_actor_that_loses_the_race_takes_the_axes_of_the_winner(make_request, monkeypatch):
    monkeypatch.setattr(pipeline.workers.pair_attributor, "SAMPLE_PAIRS", 12)
    request = make_request(contexts=2)
    fit, made = pipeline.workers.pair_attributor.fit_basis, []

    def beaten(states, num_contexts):
        if not made:
            made.append(None)
            made.append(PairAttributor(request))  # another actor commits meanwhile
        basis = fit(states, num_contexts)
        return replace(basis, axes=-basis.axes)

    monkeypatch.setattr(pipeline.workers.pair_attributor, "fit_basis", beaten)
    loser = PairAttributor(request)
    assert WeightStore(request.tokens.store).table(request.targets[0].table).version() == 0
    torch.testing.assert_close(loser._basis.axes, made[1]._basis.axes, rtol=0, atol=0)


def test_a_model_with_narrow_states_or_without_finite_ones_has_no_contexts(make_request):
    with pytest.raises(InputError, match="attribute.contexts is 64, and the model's hidden states have 32 numbers"):
        PairAttributor(make_request(contexts=64))
    poisoned = {f"row{row}": {"prompt_ids": [POISON] * 4} for row in range(NUM_PAIRS)}
    with pytest.raises(InputError, match="no hidden state of the first pairs is finite, .* set attribute.contexts=0"):
        PairAttributor(make_request(contexts=2, **poisoned))


# --- the stage ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Like a signal: nothing catches it."""


def test_a_kill_loses_a_chunk_at_most_and_the_result_is_the_same(make_request, tmp_path, capsys):
    undisturbed = make_request()
    fill(undisturbed, undisturbed.targets[0], PairAttributor(undisturbed))
    expected = filled(undisturbed)
    request = replace(undisturbed, targets=[replace(undisturbed.targets[0], table="attributions/toy-1/y")])

    class Dying(PairAttributor):
        num_chunks = 0

        def fill_in(self, *args):
            if self.num_chunks == 1:
                raise Killed
            self.num_chunks += 1
            return super().fill_in(*args)

    with pytest.raises(Killed):
        fill(request, request.targets[0], Dying(request))
    assert 0 < filled(request).height < NUM_PAIRS
    fill(request, request.targets[0], PairAttributor(request))
    assert filled(request).equals(expected)
    history = WeightStore(request.tokens.store).table("attributions/toy-1/y").history()
    assert [commit.metadata["statistics"]["num_pairs"] for commit in history] == [40, 40, 40]


def test_the_stage_runs_in_a_process_of_its_own_and_again_only_for_what_is_new(
    make_request, model_folder, naive, monkeypatch, logged
):
    request = make_request(row7={"rejected_ids": [POISON, 4]})
    tokens = WeightStore(request.tokens.store).table(request.tokens.table).reference()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = AttributeSection(target="gold_logps", chunk_tokens=100 * PAIR_TOKENS)
    done = attribute(tokens, model_folder, settings, Executor())
    states = logged.progress
    assert (done.num_pairs, done.num_unscorable, done.restarts) == (NUM_PAIRS - 1, 1, ())
    assert done.num_tokens == states[-1].done == states[-1].total
    assert states[-1].name == "attribute ref"
    rows = WeightStore(request.tokens.store).table(done.output.table).scan().collect().sort("pair_id")
    pair = rows_in(request).row(0, named=True)
    expected = naive(pair["prompt_ids"], pair["chosen_ids"], "gold_logps")[4:]
    np.testing.assert_allclose(rows["chosen_attributions"][0].to_numpy(), expected, rtol=2e-4)
    quarantined = WeightStore(request.tokens.store).table("quarantine/toy-1").scan().collect()
    problem = f"{done.output.table}: rejected: gradients are not finite in float32"
    assert quarantined["detail"].to_list() == [f"{problem} (pair {quarantined['pair_id'][0]})"]
    commit = WeightStore(request.tokens.store).table(done.output.table).history()[0].metadata
    assert (commit["engine"]["dtype"], commit["engine"]["packed"]) == ("float32", True)
    assert attribute(tokens, model_folder, settings, Executor()).num_pairs == 0
    assert list(verify(WeightStore(request.tokens.store), rows=True)) == []


def test_the_identity_holds_what_changes_numbers_and_nothing_else(model_folder):
    identity = attribution_identity(model_folder, AttributeSection())
    assert identity["dtype"] == "float32"
    assert "contexts" not in identity  # what was attributed before there was the key is the same
    same = AttributeSection(chunk_tokens=1, batch_tokens=999, python="elsewhere", dtype="float32")
    assert attribution_identity(model_folder, same) == identity
    for changed in (
        {"target": "gold_logps"},
        {"dtype": "bfloat16"},
        {"prompts": True},
        {"activations": True},
        {"contexts": 4},
    ):
        assert attribution_identity(model_folder, AttributeSection(**changed)) != identity


def test_an_actor_attributes_a_chunk_like_the_process(make_request):
    request = make_request(row3={"chosen_ids": [POISON]})
    fill(request, request.targets[0], PairAttributor(request))
    expected = filled(request)
    ids = rows_in(request)["pair_id"]
    elsewhere = replace(request, targets=[replace(request.targets[0], table="attributions/toy-1/ray")])
    chunk = Chunk(0, ids[0], ids[10], 10, 10 * PAIR_TOKENS)
    batch = pl.DataFrame([vars(chunk)]).to_arrow()
    reply = ChunkScorer(elsewhere)(batch)

    class Replies:
        def iter_batches(self, **_):
            return [reply]

    (scored,) = replies(Replies())
    assert [row["source_row"] for row in scored.unscorable] == [3]
    table = WeightStore(request.tokens.store).table("attributions/toy-1/ray")
    table.append_shards(scored.shards, {"fingerprint": "attributions"})
    got = filled(elsewhere)
    assert got["pair_id"].to_list() == [pair_id for pair_id in ids[:10] if pair_id != ids[3]]
    for name in ("chosen_attributions", "rejected_attributions"):
        for one, other in zip(got[name], expected[name], strict=False):
            np.testing.assert_allclose(one.to_numpy(), other.to_numpy(), rtol=2e-4)
