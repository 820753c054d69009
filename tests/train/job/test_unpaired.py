"""Trainings on unpaired rows: KTO's loss of a whole step by hand, SFT on the rows of one side, and what is refused."""

import copy
import math

import pytest

from tests.train.conftest import Row
from train.config import DataConfig
from train.data.dataset import PairDataset, open_weights
from train.job.job import run_job
from train.job.prepare import open_inputs, open_pairs
from train.job.trainer import PairTrainer
from train.model.policy import load_policy
from weights_store.errors import MismatchError

MISMATCHED = {"identity": {"settings": {"anchors": {"source": "mismatched"}}}}
LISTS = ("ids", "token_weights", "ref_logps")


def shifted(logps: list[float], by: float) -> list[float]:
    """Reference log-probs so that the log-ratio of token t is t times `by`, t from 1."""
    return [logp - by * (t + 1) for t, logp in enumerate(logps)]


@pytest.fixture
def unpaired_rows(anchored_rows) -> list[Row]:
    """Every third row undesirable; log-ratios of token t are 0.1 t, and of anchors 0.02 t."""
    rows = copy.deepcopy(anchored_rows)
    for index, row in enumerate(rows):
        side = "chosen" if index % 3 == 0 else "rejected"
        row |= {f"{side}_{name}": [] for name in LISTS}
        for kept in {"chosen", "rejected"} - {side}:
            row[f"{kept}_ref_logps"] = shifted(row[f"{kept}_ref_logps"], 0.1)
        row["anchor_ref_logps"] = shifted(row["anchor_ref_logps"], 0.02)
    return rows


@pytest.fixture
def write_unpaired(write_weights):
    """Return a function that writes rows as a weight dataset that records how many have one response."""

    def write(rows: list[Row], **metadata) -> str:
        num_unpaired = sum(not row["chosen_ids"] or not row["rejected_ids"] for row in rows)
        counts = {"num_pairs": len(rows), "num_unpaired_rows": num_unpaired, "num_anchored_pairs": len(rows)}
        return write_weights(rows, **{"statistics": counts, **MISMATCHED, **metadata})

    return write


@pytest.fixture
def make_trainer(make_config, model_folder, tmp_path):
    def make(**changes) -> PairTrainer:
        config = make_config(**changes)
        pairs = PairDataset(open_weights(config.data), config.data, vocab_size=128, with_anchors=True)
        policy = load_policy(model_folder, config.model, config.lora)
        return PairTrainer(policy, pairs, config, checkpoints=tmp_path / "checkpoints")

    return make


def sum_to(num_tokens: int) -> float:
    return num_tokens * (num_tokens + 1) / 2


def expected(rows: list[Row], beta: float, *, is_weighted: bool) -> dict[str, float]:
    """Loss, z0 and mean reward of a step, from the log-ratios that the rows were made with; stored ones are rounded."""
    z0 = sum(0.02 * sum_to(len(row["anchor_ids"])) for row in rows) / len(rows)
    losses, rewards = [], {"chosen": [], "rejected": []}
    for row in rows:
        for side, sign in (("chosen", 1), ("rejected", -1)):
            if row[f"{side}_ids"]:
                plain = [0.1 * (t + 1) for t in range(len(row[f"{side}_ids"]))]
                weights = row[f"{side}_token_weights"] if is_weighted else [1.0] * len(plain)
                reward = sum(w * x for w, x in zip(weights, plain, strict=True))
                losses.append(1 - 1 / (1 + math.exp(-beta * sign * (reward - z0))))
                rewards[side].append(beta * sum(plain))
    means = {f"rewards/{side}": sum(found) / len(found) for side, found in rewards.items()}
    margins = means["rewards/chosen"] - means["rewards/rejected"]
    return {"loss": sum(losses) / len(losses), "kl": z0, **means, "rewards/margins": margins}


@pytest.mark.parametrize(("loss", "packing"), [("kto", False), ("tis_kto", True)])
def test_a_step_is_a_mean_over_its_responses_however_it_is_cut(
    make_trainer, write_unpaired, unpaired_rows, loss, packing
) -> None:
    write_unpaired(unpaired_rows)
    results = []
    for tokens_per_batch in (10_000, 45, 1):
        optim = {"pairs_per_step": 8, "tokens_per_batch": tokens_per_batch, "max_steps": 2, "warmup_share": 0}
        trainer = make_trainer(loss={"name": loss, "beta": 0.1}, optim=optim, model={"packing": packing})
        trainer.train()
        results.append([log for log in trainer.state.log_history if "loss" in log])
    first = [unpaired_rows[row] for row in trainer.train_dataset.order.rows(range(8))]
    assert {bool(row["chosen_ids"]) for row in first} == {True, False}
    wanted = expected(first, 0.1, is_weighted=loss == "tis_kto")
    for history in results:
        assert {name: history[0][name] for name in wanted} == pytest.approx(wanted, rel=2e-3)
        assert "rewards/accuracies" not in history[0]
        for log, other in zip(history, results[0], strict=True):
            assert (log["loss"], log["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-4)


def test_pairs_are_two_responses_to_kto(make_config, write_unpaired, anchored_rows) -> None:
    write_unpaired(anchored_rows)
    result = run_job(make_config(loss={"name": "kto", "beta": 0.1}, optim={"max_steps": 2}))
    assert result.before["loss"] == pytest.approx(0.5, abs=1e-4)  # a mean over 80 responses, z0 = 0
    assert "rewards/accuracies" in result.after
    assert result.after["loss"] < 0.5


@pytest.mark.parametrize(("swap", "side", "count"), [(False, "chosen", 26), (True, "rejected", 14)])
def test_sft_trains_on_the_rows_of_one_side(make_config, write_unpaired, unpaired_rows, swap, side, count) -> None:
    write_unpaired(unpaired_rows)
    config = make_config(loss={"name": "sft", "beta": None}, data={"swap": swap}, optim={"max_steps": 1})
    trained = open_pairs(open_inputs(config)).trained
    assert len(trained) == count == sum(bool(row[f"{side}_ids"]) for row in unpaired_rows)
    assert all(len(trained[row].chosen.ids) and not len(trained[row].rejected.ids) for row in range(count))
    result = run_job(config)
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.parametrize(
    ("changes", "metadata", "message"),
    [
        (
            {"loss": {"name": "tis_dpo"}},
            {},
            r"loss.name='tis_dpo' compares two responses to a prompt, and 40 of 40 rows of toy/tis@1 have one response; use "
            r"loss.name='kto', 'tis_kto', 'sft' or 'distill'$",
        ),
        (
            {"loss": {"name": "kto"}},
            {"identity": {"settings": {"anchors": {"max_new_tokens": 64}}}},
            r"loss.name='kto' needs anchors that are mismatched, and those of toy/tis@1 are sampled; build it again with "
            r"`tokenweights build RECIPE --set anchors.source=mismatched`$",
        ),
        (
            {
                "loss": {"name": "kto"},
                "eval": {"share": 0.2, "every_steps": 1, "best": "rewards/accuracies"},
                "output": {"save_every_steps": 1},
            },
            {},
            r"eval.best='rewards/accuracies' compares two responses to a prompt, and 40 of 40 rows .* 'rewards/margins'$",
        ),
    ],
)
def test_what_unpaired_rows_cannot_do_is_refused(
    make_config, write_unpaired, unpaired_rows, changes, metadata, message
) -> None:
    write_unpaired(unpaired_rows, **metadata)
    with pytest.raises(MismatchError, match=message):
        open_inputs(make_config(**changes))


@pytest.mark.parametrize("loss", ["kto", "sft"])
def test_held_out_rows_of_one_label_have_no_margin_to_choose_by(
    make_config, write_unpaired, unpaired_rows, loss
) -> None:
    rows = [row for row in unpaired_rows if row["split"] == "train" or row["chosen_ids"]]
    write_unpaired(rows)
    config = make_config(
        loss={"name": loss},
        data={"split": "train"},
        eval={"split": "test", "every_steps": 1, "best": "rewards/margins"},
        output={"save_every_steps": 1},
        optim={"max_steps": 1},
    )
    with pytest.raises(
        MismatchError,
        match=r"eval.best='rewards/margins' compares chosen with rejected responses, and the held-out rows of toy/tis@1 are "
        r"all of one kind; set it to 'loss', or hold out others$",
    ):
        run_job(config)


def test_the_adapter_of_trl_refuses_them(write_unpaired, unpaired_rows, model_folder, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    from train.trl_adapter import WeightedDPOTrainer

    data = DataConfig(store=write_unpaired(unpaired_rows), weights="toy/tis")
    with pytest.raises(
        MismatchError, match=r"TRL's DPOTrainer compares two responses to a prompt, and 40 rows of toy/tis@0"
    ):
        WeightedDPOTrainer(model_folder, trl.DPOConfig(str(tmp_path / "trl"), use_cpu=True), data, loss="dpo")


def test_a_triplet_needs_sampled_anchors(make_config, write_unpaired, anchored_rows) -> None:
    write_unpaired(anchored_rows)
    with pytest.raises(MismatchError, match="needs anchors that are sampled, and those of toy/tis@1 are mismatched"):
        open_inputs(make_config(loss={"name": "ti_dpo"}))


def test_the_gate_looks_at_anchors_too(make_config, write_unpaired, unpaired_rows, anchored_rows) -> None:
    """Only the anchors' log-probs are off."""
    rows = [{**row, "anchor_ref_logps": [x - 0.5 for x in row["anchor_ref_logps"]]} for row in anchored_rows]
    write_unpaired(rows)
    with pytest.raises(MismatchError, match="step-0 gate: the model's log-probs differ from the stored ones"):
        run_job(make_config(loss={"name": "kto", "beta": 0.1}))
