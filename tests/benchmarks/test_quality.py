"""The quality benchmark: its arithmetic by hand, and a small form of it end to end."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.quality import close_look, runs, scores, summary, worlds
from pipeline.toy.policy_table import reward_at_kl
from pipeline.toy.sampling import measure_each, sample


def points(*pairs):
    return [{"kl": kl, "reward": reward} for kl, reward in pairs]


def test_reward_at_kl_is_linear_in_the_square_root():
    curve = points((0, 1.0), (4.0, 5.0), (1.0, 2.5))
    assert reward_at_kl(curve, 1.0) == pytest.approx(2.5)
    assert reward_at_kl(curve, 2.25) == pytest.approx(3.75)  # half way between sqrt 1 and 2
    assert math.isnan(reward_at_kl(curve, 4.1))


def test_a_setting_is_chosen_on_the_other_seeds():
    """Setting a is best on seed 1 alone, by luck; the other seeds say b."""
    settings = {
        "a": {1: points((0, 0), (1, 9.0)), 2: points((0, 0), (1, 1.0)), 3: points((0, 0), (1, 1.0))},
        "b": {1: points((0, 0), (1, 2.0)), 2: points((0, 0), (1, 2.0)), 3: points((0, 0), (1, 2.0))},
    }
    assert summary.chosen_rewards(settings, 1.0) == {1: (2.0, "b"), 2: (1.0, "a"), 3: (1.0, "a")}


def test_gap_closed_is_a_ratio_of_means():
    found = summary.gap_closed({1: 2.0, 2: 4.0}, {1: 1.0, 2: 1.0}, {1: 3.0, 2: 7.0})
    assert found["percent"] == pytest.approx(100 * 4 / 8)  # gains 1 and 3, gaps 2 and 6
    assert found["half_width"] == pytest.approx(0)  # without either seed it is the same


def test_spearman_shares_the_ranks_of_ties():
    assert summary.spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert summary.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)


def test_agreement_of_ranks_by_hand():
    """Seed 1: three of four pairs are right, and two with equal measures do not count. Seed 2: one pair, wrong."""
    first = [(0.1, 1.0), (0.1, 2.0), (0.2, 1.5), (0.2, 3.0)]
    found = summary.rank_agreement([first, [(0.1, 5.0), (0.3, 4.0)]])
    assert found["pairs_right"][0] == pytest.approx((3 / 4 + 0) / 2)
    # Ranks 0.5, 0.5, 2.5, 2.5 against 0, 2, 1, 3: the products of deviations sum to 2, their squares to 4 and 5.
    assert found["spearman"][0] == pytest.approx(2 / math.sqrt(4 * 5))  # two families are too few
    assert found["num_seeds"] == 2


def test_a_tie_is_half_a_win():
    assert close_look.win_rate([1.0, 2.0, -1.0, 0.0], [0.0, 2.0, 3.0, 0.0]) == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    folder = worlds.planted_model(tmp_path_factory.mktemp("quality") / "model", num_epochs=2)
    return worlds.planted(folder, "sparse", 0, num_pairs=200, num_other=100, num_samples=160)


def test_expected_rewards_and_kl_agree_with_what_was_sampled(world):
    """Means over the vocabulary and log-ratios of samples estimate the same; of the policy that is the reference, KL is 0."""
    base = world.base
    moved = base.plain_copy(base.policy.model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    prompts = world.prompts * 4
    next_rewards = world.rewards.behind(prompts, base.device)
    for model, has_moved in ((base.plain, False), (moved, True)):
        responses, kls, rewards = measure_each(base, model, prompts, next_rewards, num_new=world.num_new, seed=3)
        raw = np.array([world.rewards.of(*each).sum() for each in zip(prompts, responses, strict=True)])
        assert abs((rewards - raw).mean()) < 4 * (rewards - raw).std() / math.sqrt(len(raw))
        assert rewards.std() < raw.std()
        log_ratios = np.array(
            [
                float((x - y).sum())
                for x, y in zip(
                    scores.logps_of(base, model, prompts, responses),
                    scores.logps_of(base, base.plain, prompts, responses),
                    strict=True,
                )
            ]
        )
        assert abs((kls - log_ratios).mean()) <= 4 * (kls - log_ratios).std() / math.sqrt(len(raw)) + 1e-6
        assert (kls.mean() > 0.1) == has_moved


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_sampled_tokens_have_the_probabilities_of_the_model(world, temperature):
    model, prompt = world.base.plain, world.prompts[0]
    responses = sample(world.base, model, [prompt] * 2000, 1, seed=1, temperature=temperature)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(prompt[None].astype(np.int64))).logits[0, -1]
    probs = (logits / temperature).softmax(-1).numpy()
    counts = np.bincount([ids[0] for ids in responses], minlength=len(probs))
    errors = np.sqrt(2000 * probs * (1 - probs)) + 1
    assert (abs(counts - 2000 * probs) < 5 * errors).all()


def test_a_close_look_begins_at_zero_and_finds_the_middle_kl(world):
    base = world.base
    look = close_look.CloseLook(scores.Scorers(world), beta=0.1)
    assert [look.points[0][name] for name in ("kl", "train", "unseen")] == [0, [0, 0], [0, 0]]
    assert look.at_middle is None
    moved = base.plain_copy(base.policy.model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.06 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    look(5, moved)
    after = scores.logps_of(base, moved, *scores.sequences(world.rows))
    before = scores.logps_of(base, base.plain, *scores.sequences(world.rows))
    rejected = np.mean([(x - y).sum() for x, y in zip(after[1::2], before[1::2], strict=True)])
    assert look.points[1]["train"][1] == pytest.approx(0.1 * rejected, abs=1e-4)
    # One step of KL 2 to 4 lies around the middle KL of 1: the policy in between is nearer to it.
    assert look.points[1]["kl"] > 2
    assert runs.measured(world, look.at_middle, 0)["kl"] == pytest.approx(world.kls[1], rel=0.25)


def test_scores_know_no_label_of_their_own_pair(world):
    """A head that is fitted on labels drawn at random predicts no label: the scores of a pair come from other pairs."""
    rng = np.random.default_rng(0)
    drawn = [row if rng.random() < 0.5 else (row[0], row[2], row[1]) for row in world.rows]
    blind = scores.Scorers(worlds.replace(world, rows=drawn)).head()
    right = (scores.margins_of(blind) > 0).mean()
    assert abs(right - 0.5) < 4 * 0.5 / math.sqrt(len(drawn))


def test_a_killed_run_goes_on_and_the_summary_reads_it(world, tmp_path):
    small = worlds.replace(world, steps=(3, 6), kls=(0.001, 0.002, 0.003))
    names = {"DPO": 1, "oracle weights": 1, "head": 1}
    log = runs.Log(tmp_path / "planted-1.jsonl")
    runs.run_world(lambda: small, log, {"DPO": 1})
    before = log.path.read_text()
    with log.path.open("a") as file:
        file.write('{"kind": "policy", "fam')  # killed while it wrote
    runs.run_world(lambda: small, runs.Log(log.path), names)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert log.path.read_text().startswith(before)
    assert {line["family"] for line in lines if line["kind"] == "policy"} == set(names)
    log.path.with_name("planted-2.jsonl").write_text(log.path.read_text())
    found = summary.summarise([log.path, log.path.with_name("planted-2.jsonl")], small.kls)
    assert found["rows"]["oracle weights"]["at_kl"]["0.002"]["gap_closed"]["percent"] == pytest.approx(100)
    assert found["rows"]["head"]["scores"]["token_corr"] > 0.4
