"""What the runs say: reward at equal KL, the gap that is closed with its interval, and how measures rank scores.

Settings are chosen by leaving one seed out: for each seed, a family gets the setting with the highest mean reward over the
other seeds. So nothing is chosen on what it is reported on, and every run is used.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.methods import DPO, FAMILIES, ORACLE
from pipeline.toy.policy_table import reward_at_kl

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""Student's t for a 95 % interval of the mean of n values."""
Points = Sequence[Mapping[str, float]]
Runs = dict[str, dict[str, dict[int, Points]]]
"""Points by family, setting and seed; those of a seed begin with the starting model."""


def read_runs(paths: Sequence[Path]) -> tuple[Runs, dict[str, dict[int, dict[str, float]]]]:
    """Return the points of one world and its scores' properties by family and seed; the seed ends the name of a file."""
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    scores: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for path in paths:
        seed, start = int(path.stem.rsplit("-", 1)[1]), dict[str, float]()
        for line in map(json.loads, path.read_text().splitlines()):
            if line["kind"] == "start":
                start = line
            elif line["kind"] == "scores":
                scores[line["family"]][seed] = {k: v for k, v in line.items() if k not in ("kind", "family")}
            elif line["kind"] == "policy":
                runs[line["family"]][line["setting"]][seed] = [start, *line["points"]]
    return runs, scores


def chosen_rewards(settings: Mapping[str, Mapping[int, Points]], kl: float) -> dict[int, tuple[float, str]]:
    """Return the reward at a KL for each seed, and the setting, chosen on the other seeds; seeds without one are left out."""
    table = {name: {seed: reward_at_kl(points, kl) for seed, points in of.items()} for name, of in settings.items()}
    found = {}
    for seed in sorted({seed for of in table.values() for seed in of}):
        means = {}
        for name, of in table.items():
            others = [value for other, value in of.items() if other != seed]
            if others and seed in of and not any(map(math.isnan, [*others, of[seed]])):
                means[name] = float(np.mean(others))
        if means:
            best = max(means, key=means.__getitem__)
            found[seed] = table[best][seed], best
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half the width of a 95 % interval (Student's t); nan for fewer than two values."""
    n = len(values)
    half = T_95.get(n, 1.96) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), half


def gap_closed(
    of_family: Mapping[int, float], of_dpo: Mapping[int, float], of_oracle: Mapping[int, float]
) -> dict[str, float]:
    """Return (family - DPO) / (oracle - DPO) in percent: the ratio of mean differences, with a jackknife interval over seeds.

    Means first: one seed with a small gap would swamp the mean of ratios.
    """
    seeds = sorted(of_family.keys() & of_dpo.keys() & of_oracle.keys())
    gains = np.array([of_family[seed] - of_dpo[seed] for seed in seeds])
    gaps = np.array([of_oracle[seed] - of_dpo[seed] for seed in seeds])
    n = len(seeds)
    if n < 2 or gaps.mean() <= 0:
        return {"percent": math.nan, "half_width": math.nan, "num_seeds": n}
    without = [np.delete(gains, i).mean() / np.delete(gaps, i).mean() for i in range(n)]
    error = math.sqrt((n - 1) / n * float(np.sum((np.array(without) - np.mean(without)) ** 2)))
    return {
        "percent": 100 * float(gains.mean() / gaps.mean()),
        "half_width": 100 * T_95.get(n, 1.96) * error,
        "num_seeds": n,
    }


def summarise(paths: Sequence[Path], kls: Sequence[float]) -> dict[str, Any]:
    """Return what the runs of one world say."""
    runs, scores = read_runs(paths)
    rows: dict[str, Any] = {}
    at_kl = {family: {kl: chosen_rewards(settings, kl) for kl in kls} for family, settings in runs.items()}
    for family in [each.name for each in FAMILIES if each.name in runs]:
        of_kls: dict[str, Any] = {}
        for kl in kls:
            found = {seed: reward for seed, (reward, _) in at_kl[family][kl].items()}
            dpo, oracle = (
                {seed: r for seed, (r, _) in at_kl.get(name, {}).get(kl, {}).items()} for name in (DPO, ORACLE)
            )
            both = [found[seed] - dpo[seed] for seed in sorted(found.keys() & dpo.keys())]
            mean, half = interval(list(found.values())) if found else (math.nan, math.nan)
            gain, gain_half = interval(both) if both else (math.nan, math.nan)
            of_kls[f"{kl:g}"] = {
                "reward": mean, "half_width": half, "minus_dpo": gain, "minus_dpo_half_width": gain_half,
                "gap_closed": gap_closed(found, dpo, oracle), "by_seed": found,
                "settings": {seed: name for seed, (_, name) in at_kl[family][kl].items()},
            }  # fmt: skip
        rows[family] = {"at_kl": of_kls, "scores": _mean_scores(scores.get(family, {}))}
    return {
        "every_run": {
            family: {
                setting: {seed: [round(reward_at_kl(points, kl), 4) for kl in kls] for seed, points in by_seed.items()}
                for setting, by_seed in settings.items()
            }
            for family, settings in runs.items()
        },
        "rows": rows,
        "ranking": _ranking(rows, scores, f"{kls[1]:g}"),
        "num_policies": sum(len(s) for f in runs.values() for s in f.values()),
    }


def _mean_scores(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    names = next(iter(by_seed.values()), {})
    return {name: float(np.mean([of[name] for of in by_seed.values()])) for name in names}


def _ranking(
    rows: Mapping[str, Any], scores: Mapping[str, Mapping[int, Mapping[str, float]]], kl: str
) -> dict[str, Any]:
    """Return how well measures of scores rank families by the reward of their policies at a KL; the truth is left out.

    Of families whose scores have not seen the labels, of those whose scores have, and of all.
    """
    found: dict[str, Any] = {}
    for group, belongs in (("unseen labels", (False,)), ("in sample", (True,)), ("all", (False, True))):
        names = [
            name
            for name, row in rows.items()
            if name != ORACLE and row["scores"] and bool(row["scores"]["in_sample"]) in belongs
        ]
        found[group] = {"num_families": len(names)}
        for measure in ("log_likelihood", "token_corr", "token_corr_within"):
            by_seed: dict[int, list[tuple[float, float]]] = defaultdict(list)
            for name in names:
                rewards = rows[name]["at_kl"][kl]["by_seed"]
                for seed in rewards.keys() & scores[name].keys():
                    by_seed[seed].append((scores[name][seed][measure], rewards[seed]))
            means = [(rows[name]["scores"][measure], rows[name]["at_kl"][kl]["reward"]) for name in names]
            found[group][measure] = {"spearman_of_means": _spearman_of(means)} | rank_agreement([*by_seed.values()])
    return found


def rank_agreement(seeds: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Return how well a measure ranks families by reward, mean and half width of a 95 % interval over seeds.

    `spearman` needs four families in a seed; `pairs_right` is the share of pairs of families with the better one in front.
    Pairs with equal measures are left out: families that differ in the size of their weights alone.

    Args:
        seeds: Measure and reward of each family, for each seed.
    """
    spearmans = [value for value in map(_spearman_of, seeds) if math.isfinite(value)]
    shares = []
    for families in seeds:
        pairs = [(left, right) for left, right in combinations(families, 2) if left[0] != right[0]]
        if pairs:
            shares.append(float(np.mean([(left[0] > right[0]) == (left[1] > right[1]) for left, right in pairs])))
    return {
        "spearman": interval(spearmans) if spearmans else (math.nan, math.nan),
        "pairs_right": interval(shares) if shares else (math.nan, math.nan),
        "num_seeds": len(shares),
    }


def _spearman_of(families: Sequence[tuple[float, float]]) -> float:
    pairs = [pair for pair in families if all(map(math.isfinite, pair))]
    different = all(len(set(values)) > 1 for values in zip(*pairs, strict=True))
    return spearman(*zip(*pairs, strict=True)) if len(pairs) >= 4 and different else math.nan


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the correlation of ranks; ties share theirs."""
    ranks = []
    for values in (left, right):
        array = np.array(values)
        ranks.append([float((array < x).sum() + ((array == x).sum() - 1) / 2) for x in array])
    return float(np.corrcoef(*ranks)[0, 1])
