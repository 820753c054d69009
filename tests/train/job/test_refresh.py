"""Token weights and anchors made from the policy on the way, and stored anchors in a whole training."""

import copy
import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tokenweights
from train.config import LoraSection, ModelConfig, TrainConfig
from train.data.dataset import PairDataset, open_weights
from train.job.job import run_job
from train.job.progress import ProgressLines
from train.job.refresh import HybridSettings, Refresher, find_end_ids, load_fresh, sampling_of, save_fresh
from train.job.trainer import PairTrainer
from train.model.logps import route_forward
from train.model.policy import load_policy
from train.model.sampling import AnchorSampling
from weights_store.errors import InputError, MismatchError, SettingsError
from weights_store.settings import parse_settings


def main(flags: list[str]) -> int:
    """Return the exit code of `tokenweights train`."""
    return tokenweights.main(["train", *flags])


MIX, SIGMA_DIVISOR = 0.7, 4.0
RECIPE = {
    "weights": {"estimator": "ti", "ti_lambda": MIX, "sigma_divisor": SIGMA_DIVISOR, "span": "response"},
    "attribute": {"target": "gold_logps"},
    "anchors": {"max_new_tokens": 5, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 0},
}
PAPER = {"name": "ti_dpo", "beta": 0.1}
ONLINE = {**PAPER, "importance": "online", "anchor": "online", "refresh_steps": 3}


def compute_hybrid_weights(model, prompt_ids: list[int], ids: list[int], span: str) -> list[float]:
    """Oracle: one sequence, its gradient by autograd, and the formula term by term."""
    whole = torch.tensor([prompt_ids + ids])
    embeddings = model.get_input_embeddings()(whole).detach().requires_grad_()
    logps = model(inputs_embeds=embeddings).logits[0].log_softmax(-1)
    first = len(prompt_ids)
    total = sum(logps[t - 1, whole[0, t]] for t in range(first, whole.shape[1]))
    norms = torch.autograd.grad(total, embeddings)[0][0].abs().sum(-1).tolist()
    norms = norms[first:] if span == "response" else norms
    length = len(norms)
    sigma = max(1.0, length / SIGMA_DIVISOR)
    prior = [math.exp(-0.5 * ((t - (length - 1) / 2) / sigma) ** 2) for t in range(length)]
    weights = [
        length * (MIX * norm / sum(norms) + (1 - MIX) * peak / sum(prior))
        for norm, peak in zip(norms, prior, strict=True)
    ]
    return weights[-len(ids) :]


@pytest.fixture(scope="session")
def ti_rows(model, anchored_rows) -> list[dict]:
    """Rows whose weights are TI weights of `model`, the reference."""
    rows = copy.deepcopy(anchored_rows)
    for row in rows:
        for side in ("chosen", "rejected"):
            ids = (row["prompt_ids"], row[f"{side}_ids"])
            row[f"{side}_token_weights"] = compute_hybrid_weights(model, *ids, "response")
    return rows


@pytest.fixture
def ti_store(write_weights, ti_rows) -> str:
    statistics = {"num_pairs": len(ti_rows), "num_anchored_pairs": len(ti_rows)}
    return write_weights(ti_rows, recipe=RECIPE, statistics=statistics)


@pytest.fixture
def make_trainer(make_config, model_folder, tmp_path):
    def make(store: str, **changes) -> PairTrainer:
        config = make_config(data={"store": store}, **changes)
        source = open_weights(config.data)
        with_anchors = config.loss.anchor == "stored"
        pairs = PairDataset(source, config.data, vocab_size=128, with_anchors=with_anchors)
        policy = load_policy(model_folder, config.model, config.lora)
        reference = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).requires_grad_(False).eval()
        reference.set_attn_implementation(policy.model.config._attn_implementation)
        return PairTrainer(policy, pairs, config, checkpoints=tmp_path / "checkpoints", reference=reference)

    return make


@pytest.fixture
def policy(model_folder):
    policy = load_policy(model_folder, ModelConfig(path=str(model_folder)))
    route_forward(policy.model)
    return policy


@pytest.fixture
def pairs(ti_store, make_config) -> list:
    config = make_config(data={"store": ti_store})
    dataset = PairDataset(open_weights(config.data), config.data, vocab_size=128)
    return [dataset[row] for row in range(12)]


def history_of(folder: Path) -> list[dict]:
    """What was logged, without durations."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return [{k: v for k, v in log.items() if not k.endswith("_s")} for log in metrics["history"] if "loss" in log]


def flags_of(settings: dict, **more: object) -> list[str]:
    values = {f"{section}.{key}": value for section, part in settings.items() for key, value in part.items()} | more
    return [flag for key, value in values.items() for flag in ("--set", f"{key}={value}")]


# --- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", ["response", "sequence"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_fresh_weights_are_those_of_one_sequence_at_a_time(policy, model, pairs, ti_rows, span, is_packed) -> None:
    if not is_packed:
        policy = load_policy(policy.model.config._name_or_path, ModelConfig(path="", packing=False))
    hybrid = HybridSettings("gold_logps", MIX, SIGMA_DIVISOR, with_prompts=span == "sequence")
    stale = [replace(pair, chosen=replace(pair.chosen, token_weights=pair.chosen.token_weights * 9)) for pair in pairs]
    fresh = Refresher(policy, hybrid=hybrid, tokens_per_batch=60).refresh([*stale, stale[0]], seed=0)  # one twice
    assert len(fresh) == 13
    for pair, row in zip(fresh, [*ti_rows[:12], ti_rows[0]], strict=True):
        for side in ("chosen", "rejected"):
            expected = compute_hybrid_weights(model, row["prompt_ids"], row[f"{side}_ids"], span)
            assert getattr(pair, side).token_weights == pytest.approx(expected, rel=2e-4)
            assert getattr(pair, side).ids.tolist() == row[f"{side}_ids"]


def test_how_weights_are_made_is_read_from_the_dataset_and_others_are_refused(
    make_config, write_weights, ti_rows
) -> None:
    def source_of(**metadata):
        return open_weights(make_config(data={"store": write_weights(ti_rows, **metadata)}).data)

    assert HybridSettings.of(source_of(recipe=RECIPE)) == HybridSettings("gold_logps", MIX, SIGMA_DIVISOR, False)
    longer = {**RECIPE, "weights": {**RECIPE["weights"], "span": "sequence"}}
    assert HybridSettings.of(source_of(recipe=longer)).with_prompts
    tis = source_of(recipe={"weights": {"estimator": "tis"}})
    with pytest.raises(MismatchError, match=r"toy/tis@3 was built with 'tis'\. Build it again with .*estimator=ti"):
        HybridSettings.of(tis)
    with pytest.raises(MismatchError, match=r"toy/tis@4 was built with None"):
        HybridSettings.of(source_of())
    smoothed = {**RECIPE, "weights": {**RECIPE["weights"], "transforms": ["smooth"]}}
    with pytest.raises(
        MismatchError, match=r"was built with weights.transforms=\['smooth'\], which only a build applies"
    ):
        HybridSettings.of(source_of(recipe=smoothed))
    assert sampling_of(tis) == AnchorSampling(64, 0.8, 50, 0.95)  # the release's
    assert sampling_of(source_of(recipe=RECIPE)).max_new_tokens == 5


def test_gradients_that_are_not_finite_name_the_pair(policy, pairs) -> None:
    with torch.no_grad():
        policy.model.model.embed_tokens.weight[int(pairs[3].rejected.ids[0])] = math.nan
    refresher = Refresher(policy, hybrid=HybridSettings("gold_logps", MIX, SIGMA_DIVISOR, False), tokens_per_batch=1)
    with pytest.raises(SettingsError, match=r"not finite \(\d+ tokens of a micro-batch, the first in pair pair-0003\)"):
        refresher.refresh(pairs[3:4], seed=0)


def test_at_the_start_fresh_weights_train_like_stored_ones(make_trainer, ti_store) -> None:
    histories = []
    for loss in ({**PAPER, "triplet_gamma": 0}, {**PAPER, "triplet_gamma": 0, "importance": "online"}):
        trainer = make_trainer(ti_store, loss=loss, optim={"max_steps": 1, "warmup_share": 0})
        trainer.train()
        (log,) = [log for log in trainer.state.log_history if "loss" in log]
        histories.append([log["loss"], log["grad_norm"], log["weighted_rewards/margins"]])
        assert ("refresh_s" in log) == ("importance" in loss)
    assert histories[1] == pytest.approx(histories[0], rel=1e-4, abs=1e-6)


# --- anchors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_adapters", [False, True])
def test_fresh_anchors_carry_the_frozen_references_log_probs(
    model_folder, model, full_logps, pairs, with_adapters
) -> None:
    config = ModelConfig(path=str(model_folder))
    policy = load_policy(model_folder, config, LoraSection(rank=4) if with_adapters else None)
    with torch.no_grad():  # the policy has moved: it is not its reference any more
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name or (not with_adapters and "down_proj" in name):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    reference = None if with_adapters else load_policy(model_folder, config).model
    route_forward(policy.model)
    same_prompt = replace(pairs[1], pair_id="other")
    refresher = Refresher(policy, reference, sampling=AnchorSampling(max_new_tokens=6), tokens_per_batch=40)
    fresh = refresher.refresh([*pairs, same_prompt], seed=1)
    assert fresh[12].anchor is fresh[1].anchor
    for before, pair in zip(pairs, fresh, strict=False):
        prompt_ids, ids = pair.prompt_ids.tolist(), pair.anchor.ids.tolist()
        assert 1 <= len(ids) <= 6
        assert pair.anchor.ref_logps == pytest.approx(full_logps(prompt_ids, ids), abs=1e-4)
        assert pair.anchor.token_weights.tolist() == [1.0] * len(ids)
        assert pair.chosen is before.chosen


def test_a_turn_ends_where_most_responses_do(pairs) -> None:
    assert find_end_ids(pairs) == (2,)
    longest = max(pairs, key=lambda pair: len(pair.chosen.ids))
    cut = replace(longest.chosen, ids=np.full(40, 9, np.int32))  # by a maximum of 40, as many as you like
    assert find_end_ids([pairs[0], *[replace(pairs[1], chosen=cut, rejected=cut)] * 5]) == (2,)
    mixed = [replace(pair.chosen, ids=np.array([5, 6 + i], np.int32)) for i, pair in enumerate(pairs)]
    assert find_end_ids([replace(pair, chosen=mixed[i], rejected=mixed[-i]) for i, pair in enumerate(pairs)]) == ()


def test_stored_anchors_add_the_margin_to_the_first_loss(make_config, ti_store) -> None:
    result = run_job(make_config(data={"store": ti_store}, loss=PAPER))
    # policy = reference: log 2 + gamma * margin, and gradients of the first term alone
    assert result.before["loss"] == pytest.approx(math.log(2) + 0.1 * 0.5, abs=1e-4)
    assert result.before["triplet"] == pytest.approx(0.5, abs=1e-4)
    assert result.after["rewards/margins"] > result.before["rewards/margins"]
    assert "refresh_s" not in json.loads((result.folder / "metrics.json").read_text())["history"][0]


def test_a_dataset_without_anchors_is_refused_before_the_folder_is_claimed(make_config, write_weights, ti_rows) -> None:
    for statistics in ({"num_pairs": 40}, {"num_pairs": 40, "num_anchored_pairs": 39}):
        uri = write_weights(ti_rows, recipe=RECIPE, statistics=statistics)
        config = make_config(data={"store": uri}, loss=PAPER)
        for dry_run in (True, False):
            with pytest.raises(MismatchError, match=r"needs anchor_ids, anchor_ref_logps, which toy/tis@\d lacks"):
                run_job(config, dry_run=dry_run)
        assert not Path(config.output.folder).exists()


def test_online_weights_need_ti_weights_before_the_folder_is_claimed(make_config, store) -> None:
    config = make_config(data={"store": store}, loss={**PAPER, "triplet_gamma": 0, "importance": "online"})
    for dry_run in (True, False):
        with pytest.raises(
            MismatchError, match=r"loss\.importance='online' computes weights with the settings of the dataset"
        ):
            run_job(config, dry_run=dry_run)
    assert not Path(config.output.folder).exists()


def test_a_model_that_is_cut_up_is_refused(make_config) -> None:
    settings = make_config(loss=ONLINE).model_dump(exclude_none=True) | {"parallel": {"strategy": "fsdp2"}}
    with pytest.raises(SettingsError, match=r"parallel\.strategy='fsdp2' splits it; set parallel\.strategy='ddp'"):
        parse_settings(TrainConfig, settings, where="here")


# --- windows -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def refreshed(monkeypatch) -> list[tuple[list[str], int]]:
    """Ids and seed of every refresh."""
    calls: list[tuple[list[str], int]] = []
    ordinary = Refresher.refresh

    def note(self, pairs, seed):
        calls.append(([pair.pair_id for pair in pairs], seed))
        return ordinary(self, pairs, seed)

    monkeypatch.setattr(Refresher, "refresh", note)
    return calls


def test_pairs_are_refreshed_window_by_window_in_the_order_of_training(make_trainer, ti_store, refreshed) -> None:
    trainer = make_trainer(ti_store, loss=ONLINE)
    trainer.train()
    order = [f"pair-{row:04d}" for row in trainer.train_dataset.order.rows(range(40))]
    assert [ids for ids, _ in refreshed] == [order[:24], order[24:]]  # 5 steps of 8 pairs: 3 and 2
    assert len({seed for _, seed in refreshed}) == 2
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["refresh_s"] > 0 for log in logs] == [True, False, False, True, False]
    assert all("triplet" in log for log in logs)
    # measured on what stays the same: stored weights, and no triplet where anchors come and go
    assert "triplet" not in trainer.measure([trainer.train_dataset.pairs[0]])


def test_the_policy_of_the_windows_first_step_makes_the_weights(make_trainer, ti_store, monkeypatch) -> None:
    used: list[np.ndarray] = []
    ordinary = PairTrainer.cut_step
    monkeypatch.setattr(
        PairTrainer, "cut_step", lambda self, pairs, device: used.append(pairs) or ordinary(self, pairs, device)
    )
    loss = {**PAPER, "triplet_gamma": 0, "importance": "online", "refresh_steps": 2}
    trainer = make_trainer(ti_store, loss=loss, optim={"learning_rate": 1e-2, "warmup_share": 0, "max_steps": 4})
    policies = []
    trainer.add_callback(_Snapshots(policies))
    trainer.train()
    for step, begin in ((0, 0), (1, 0), (2, 2), (3, 2)):
        pair = used[step][0]
        expected = compute_hybrid_weights(
            policies[begin], pair.prompt_ids.tolist(), pair.chosen.ids.tolist(), "response"
        )
        assert pair.chosen.token_weights == pytest.approx(expected, rel=1e-3)
    stale = compute_hybrid_weights(policies[0], pair.prompt_ids.tolist(), pair.chosen.ids.tolist(), "response")
    assert max(abs(np.array(stale) - pair.chosen.token_weights)) > 1e-2  # the policy had moved


class _Snapshots(ProgressLines):
    """Keeps the model as it was before every step, with its ordinary forward pass."""

    def __init__(self, models: list) -> None:
        super().__init__(1, "pairs")
        self.models = models

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        config = copy.deepcopy(model.config)  # from_config writes into it
        other = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        other.load_state_dict(model.state_dict())
        self.models.append(other)


@pytest.mark.parametrize("stopped_after", [2, 3])  # within a window of 3 steps, and between two
def test_a_run_stopped_within_a_window_goes_on_as_if_nothing_had_happened(
    settings, ti_store, make_config, tmp_path, monkeypatch, refreshed, stopped_after
) -> None:
    settings["data"]["store"], settings["loss"] = ti_store, ONLINE
    run_job(make_config(data={"store": ti_store}, output={"folder": str(tmp_path / "undisturbed")}))
    undisturbed, at_once = history_of(tmp_path / "undisturbed"), refreshed.copy()
    assert len(undisturbed) == 5
    ordinary = ProgressLines.on_step_end
    checkpoint = Path(settings["output"]["folder"]) / "checkpoints" / f"checkpoint-{stopped_after}"

    def stop(self, args, state, control, **kwargs):
        if state.global_step == stopped_after:
            checkpoint.mkdir(parents=True)
            (checkpoint / "fresh-7.parquet").write_bytes(b"of a run with more processes that was killed here")
            signal.raise_signal(signal.SIGTERM)
        return ordinary(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ProgressLines, "on_step_end", stop)
        assert main(flags_of(settings)) == 130
    assert [path.name for path in checkpoint.glob("fresh-*")] == (["fresh-0.parquet"] if stopped_after == 2 else [])
    assert main(flags_of(settings)) == 0
    assert history_of(Path(settings["output"]["folder"])) == undisturbed
    assert refreshed == [*at_once, *at_once]  # nothing was made twice


def test_a_checkpoint_without_what_was_fresh_is_refused(pairs, tmp_path) -> None:
    other = replace(pairs[0], anchor=replace(pairs[0].chosen, ref_logps=pairs[0].chosen.ref_logps * 2))
    save_fresh(tmp_path, 0, {8: other})
    save_fresh(tmp_path, 1, {9: pairs[1]})
    found = load_fresh(tmp_path, {9: pairs[1], 8: pairs[0], 12: replace(pairs[1], is_filler=True)})
    assert list(found) == [9, 8, 12]  # by whichever process, and for fillers of another number of processes
    assert found[8].anchor.ref_logps.tolist() == other.anchor.ref_logps.tolist()
    assert found[8].anchor.ids.tolist() == pairs[0].chosen.ids.tolist()
    assert found[9].anchor is None
    for wanted in ({10: pairs[1]}, {8: pairs[1]}):
        with pytest.raises(
            InputError, match=r"lacks the weights or anchors of pair pair-0001 \(position \d+\); set output"
        ):
            load_fresh(tmp_path, wanted)


def test_weights_and_anchors_are_refreshed_with_adapters_in_bfloat16(make_config, ti_store, tmp_path) -> None:
    """The reference of fresh anchors is the policy without its adapters: all log-ratios of the first window are 0."""
    config = make_config(
        data={"store": ti_store},
        loss={**ONLINE, "refresh_steps": 2},
        lora={"rank": 4},
        model={"dtype": "bfloat16"},
        optim={"max_steps": 4, "warmup_share": 0, "learning_rate": 1e-2},
        gate={"tolerance_nats": 0.1},
    )
    run_job(config)
    logs = [log for log in history_of(tmp_path / "out") if "triplet" in log]
    margin = config.loss.triplet_margin
    assert logs[0]["triplet"] == pytest.approx(margin, abs=1e-4 + 0.05 * margin)
    assert logs[0]["triplet/to_chosen"] == pytest.approx(0, abs=0.05)
    assert len(logs) == 4
    assert logs[3]["triplet/to_chosen"] > 2 * logs[0]["triplet/to_chosen"]  # the adapters have moved


def test_fillers_of_a_window_are_refreshed_wherever_they_are(policy, pairs) -> None:
    """The longest pair comes first in a micro-batch, and may be one that only fills a step of several processes."""
    by_length = sorted(pairs[:3], key=lambda pair: len(pair.chosen.ids) + len(pair.rejected.ids))
    refresher = Refresher(policy, hybrid=HybridSettings("gold_logps", MIX, SIGMA_DIVISOR, False))
    expected = refresher.refresh(by_length, seed=0)
    fresh = refresher.refresh([*by_length[:2], replace(by_length[2], is_filler=True)], seed=0)
    assert fresh[2].is_filler
    for pair, other in zip(fresh, expected, strict=True):
        np.testing.assert_allclose(pair.chosen.token_weights, other.chosen.token_weights, rtol=1e-5)
