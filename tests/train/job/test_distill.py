"""Trainings on the stored top k of a teacher, which is another model than the student and is not loaded."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.train.conftest import Row, compute_full_logps
from train.job import training
from train.job.job import run_job
from train.job.prepare import open_inputs, open_pairs
from weights_store.errors import MismatchError
from weights_store.fingerprint import fingerprint_model

NUM_TOP = 8
DISTILL = {"name": "distill", "beta": None}
STEPS = {"max_steps": 6, "learning_rate": 3e-3, "warmup_share": 0}


def make_teacher(model: torch.nn.Module) -> torch.nn.Module:
    teacher, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return teacher


def of_teacher(teacher: torch.nn.Module, row: Row, **changes: object) -> Row:
    """The row without its rejected response, with what the teacher says of the chosen one."""
    ids, sequence = row["chosen_ids"], torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
    with torch.no_grad():
        logps = teacher(input_ids=sequence).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    top = logps.topk(NUM_TOP)
    empty = [f"rejected_{name}" for name in ("ids", "token_weights", "ref_logps", "ref_top_ids", "ref_top_logps")]
    return {
        **row,
        **{name: [] for name in empty},
        "chosen_token_weights": [1.0] * len(ids),
        "chosen_ref_logps": compute_full_logps(teacher, row["prompt_ids"], ids),
        "chosen_ref_top_ids": top.indices.flatten().tolist(),
        "chosen_ref_top_logps": top.values.flatten().tolist(),
        **changes,
    }


@pytest.fixture(scope="module")
def distilled_rows(model, rows) -> list[Row]:
    teacher = make_teacher(model)
    return [of_teacher(teacher, row) for row in rows[:16]]


@pytest.fixture
def write_distilled(write_weights):
    """Return a function that writes rows with a top k, which may be of pairs."""

    def write(rows: list[Row], teacher: str = "of another model") -> str:
        num_unpaired = sum(not row["rejected_ids"] for row in rows)
        counts = {"num_pairs": len(rows), "num_unpaired_rows": num_unpaired, "ref_top_k": NUM_TOP}
        return write_weights(rows, statistics=counts, reference={"model_fingerprint": teacher})

    return write


def expected_loss(model: torch.nn.Module, rows: list[Row]) -> float:
    """Mean over all tokens of weight times KL, with Python's sums over the bucketed distributions."""
    total, num_tokens = 0.0, 0
    for row in rows:
        ids = row["chosen_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["prompt_ids"] + ids])).logits[0, -len(ids) - 1 : -1]
        student = logits.double().softmax(-1)
        top_ids = torch.tensor(row["chosen_ref_top_ids"]).view(len(ids), NUM_TOP)
        p = torch.tensor(row["chosen_ref_top_logps"], dtype=torch.float64).view(len(ids), NUM_TOP).exp()
        q = student.gather(1, top_ids)
        p, q = (torch.cat([values, 1 - values.sum(-1, keepdim=True)], -1) for values in (p, q))
        total += float((torch.tensor(row["chosen_token_weights"]) * (p * (p / q).log()).sum(-1)).sum())
        num_tokens += len(ids)
    return total / num_tokens


def test_a_student_comes_nearer_to_a_teacher_that_is_not_loaded(
    make_config, write_distilled, distilled_rows, model, monkeypatch
) -> None:
    write_distilled(distilled_rows)
    loaded = []
    load_policy = training.load_policy
    monkeypatch.setattr(training, "load_policy", lambda *a, **k: loaded.append(a[0]) or load_policy(*a, **k))
    monkeypatch.setattr(training, "load_reference", lambda *_: pytest.fail("a reference was loaded"))
    results = []
    for tokens_per_batch in (10_000, 40):  # a step is a mean over its tokens however it is cut
        optim = {**STEPS, "pairs_per_step": 8, "tokens_per_batch": tokens_per_batch}
        output = {"folder": str(Path(make_config().output.folder) / str(tokens_per_batch))}
        results.append(run_job(make_config(loss=DISTILL, optim=optim, output=output)))
    first, second = results
    assert len(loaded) == 2
    assert first.before["loss"] == pytest.approx(expected_loss(model, distilled_rows), rel=1e-3)
    assert first.after["loss"] < 0.7 * first.before["loss"]
    num_tokens = sum(len(row["chosen_ids"]) for row in distilled_rows)
    of_responses = first.before["kl_ref_policy/chosen"] * len(distilled_rows)
    assert of_responses == pytest.approx(first.before["loss"] * num_tokens, rel=1e-5)
    assert second.after == pytest.approx(first.after, rel=1e-3)


def test_token_weights_multiply_the_loss_of_their_tokens(make_config, write_distilled, distilled_rows, model) -> None:
    rows = [
        {**row, "chosen_token_weights": [0.5 * (t % 4) for t in range(len(row["chosen_ids"]))]}
        for row in distilled_rows
    ]
    write_distilled(rows)
    before = run_job(make_config(loss=DISTILL, optim={"max_steps": 1})).before
    assert before["loss"] == pytest.approx(expected_loss(model, rows), rel=1e-3)
    assert abs(before["loss"] - expected_loss(model, distilled_rows)) > 0.01


def test_a_share_of_likelihood_is_added_to_each_token(make_config, write_distilled, distilled_rows) -> None:
    write_distilled(distilled_rows)
    num_tokens = sum(len(row["chosen_ids"]) for row in distilled_rows)
    before = run_job(make_config(loss={**DISTILL, "nll_lambda": 0.5}, optim={"max_steps": 1})).before
    nll = -before["logps/chosen"] * len(distilled_rows) / num_tokens
    kl = before["kl_ref_policy/chosen"] * len(distilled_rows) / num_tokens
    assert before["loss"] == pytest.approx(kl + 0.5 * nll, rel=1e-4)


def test_a_student_that_is_the_teacher_starts_at_0_and_is_told(
    make_config, write_distilled, model, model_folder, rows
) -> None:
    write_distilled([of_teacher(model, row) for row in rows[:8]], fingerprint_model(model_folder))
    config = make_config(loss=DISTILL, optim={"max_steps": 1})
    assert abs(run_job(config).before["loss"]) < 1e-5
    (notice,) = open_pairs(open_inputs(config)).notices
    assert notice.endswith(
        "tiny-model0' is the teacher that toy/tis@1 was scored with, so the KL starts at 0; set it to the student, or build "
        "the dataset with another model.path"
    )
    assert open_pairs(open_inputs(make_config(loss={"name": "sft", "beta": None}))).notices == []


def test_of_pairs_the_chosen_responses_are_learnt(make_config, write_distilled, distilled_rows, model, rows) -> None:
    teacher = make_teacher(model)
    pairs = []
    for row, pair in zip(distilled_rows, rows, strict=False):
        other = of_teacher(teacher, {**pair, "chosen_ids": pair["rejected_ids"]})
        pairs.append(row | {name.replace("chosen", "rejected"): other[name] for name in row if "chosen_" in name})
    write_distilled(pairs)
    result = run_job(make_config(loss=DISTILL, optim=STEPS))
    assert result.before["loss"] == pytest.approx(expected_loss(model, distilled_rows), rel=1e-3)
    assert result.after["loss"] < result.before["loss"]


def test_a_student_may_have_another_number_of_ids_but_no_other_tokenizer(
    make_config, write_distilled, distilled_rows, model_folder, tmp_path
) -> None:
    """Models of a family pad their embeddings differently."""
    write_distilled(distilled_rows)
    folder = tmp_path / "student"
    shutil.copytree(model_folder, folder)
    wider = AutoModelForCausalLM.from_pretrained(model_folder)
    wider.resize_token_embeddings(136, mean_resizing=False)
    wider.save_pretrained(folder)
    result = run_job(make_config(model={"path": str(folder)}, loss=DISTILL, optim=STEPS))
    assert result.after["loss"] < result.before["loss"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["another"] = tokenizer["model"]["vocab"].pop("w9")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(MismatchError, match="was tokenised with tokenizer .*: its ids would mean other text"):
        open_inputs(make_config(model={"path": str(folder)}, loss=DISTILL))


def test_an_id_that_the_student_lacks_is_refused(make_config, write_distilled, distilled_rows) -> None:
    ids = distilled_rows[0]["chosen_ref_top_ids"]
    write_distilled([{**distilled_rows[0], "chosen_ref_top_ids": [*ids[:-1], 128]}, *distilled_rows[1:]])
    with pytest.raises(MismatchError, match=r"chosen_ref_top_ids.* 128, expected an id in 0..127"):
        run_job(make_config(loss=DISTILL))


def test_a_dataset_without_a_top_k_is_refused(make_config, store) -> None:
    message = (
        "loss.name='distill' needs chosen_ref_top_ids, rejected_ref_top_ids, chosen_ref_top_logps, rejected_ref_top_logps, "
        "which toy/tis@0 lacks in some or all rows; build it again with `tokenweights build RECIPE --set score.top_k=16`$"
    )
    with pytest.raises(MismatchError, match=message):
        open_inputs(make_config(loss=DISTILL))
