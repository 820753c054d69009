"""The figures of docs/quality.md: reward against KL, and the gap that each family closes. SVG, by matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.quality.methods import DPO, ORACLE
from benchmarks.quality.summary import chosen_rewards, read_runs
from pipeline.toy.policy_table import reward_at_kl

mpl.use("svg")
mpl.rcParams |= {
    "svg.hashsalt": "tokenweights",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
from matplotlib import pyplot as plt  # noqa: E402

SHOWN = {
    DPO: "black",
    ORACLE: "tab:green",
    "head": "tab:blue",
    "TIS-DPO (D), paper": "tab:red",
    "head on other pairs": "tab:cyan",
    "P": "tab:purple",
    "random weights": "tab:gray",
}
"""Families in the curves, and their colours."""
_WITHOUT_DATE = {"Date": None}


def draw_curves(worlds: Mapping[str, Sequence[Path]], kls: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw true reward against KL for each world: means over seeds, of the setting that is best at the middle KL."""
    figure, axes = plt.subplots(1, len(worlds), figsize=(4.6 * len(worlds), 3.4), layout="constrained", squeeze=False)
    for ax, (world, paths) in zip(axes[0], worlds.items(), strict=True):
        runs, _ = read_runs(paths)
        grid = np.linspace(0.02, 1.15 * math.sqrt(kls[world][-1]), 40) ** 2
        for family, colour in SHOWN.items():
            if family not in runs:
                continue
            names = [name for _, name in chosen_rewards(runs[family], kls[world][1]).values()]
            if not names:
                continue
            of_setting = runs[family][max(set(names), key=names.count)]
            # Above the starting model, whose reward differs from seed to seed.
            curves = np.array(
                [[reward_at_kl(points, kl) - points[0]["reward"] for kl in grid] for points in of_setting.values()]
            )
            ax.plot(grid, curves.mean(0), color=colour, label=family, lw=1.6)
            if len(curves) > 1:
                error = curves.std(0, ddof=1) / math.sqrt(len(curves))
                ax.fill_between(grid, curves.mean(0) - error, curves.mean(0) + error, color=colour, alpha=0.15, lw=0)
        ax.set(
            title=world,
            xlabel="KL(policy ‖ reference), nats a response",
            ylabel="true reward above the starting model's",
        )
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata=_WITHOUT_DATE)
    plt.close(figure)


def draw_gaps(summaries: Mapping[str, Any], kls: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the gap that each family closes at the middle KL, with its 95 % interval over seeds."""
    figure, axes = plt.subplots(
        1, len(summaries), figsize=(4.6 * len(summaries), 3.6), layout="constrained", squeeze=False
    )
    for ax, (world, summary) in zip(axes[0], summaries.items(), strict=True):
        found = {
            name: row["at_kl"][f"{kls[world][1]:g}"]["gap_closed"]
            for name, row in summary["rows"].items()
            if name not in (DPO, ORACLE)
        }
        found = {name: gap for name, gap in found.items() if math.isfinite(gap["percent"])}
        names = sorted(found, key=lambda name: found[name]["percent"])
        values = np.array([[found[name]["percent"], found[name]["half_width"]] for name in names]).T
        colours = [
            "tab:blue" if value > half else "tab:red" if value < -half else "tab:gray" for value, half in values.T
        ]
        ax.barh(
            names,
            values[0],
            xerr=np.minimum(values[1], 150),
            color=colours,
            error_kw={"lw": 1, "capsize": 2},
            height=0.65,
        )
        ax.axvline(0, color="black", lw=0.8)
        ax.axvline(100, color="tab:green", lw=0.8, ls="--")
        ax.set(
            title=f"{world}, KL {kls[world][1]:g}",
            xlabel="gap closed, %: DPO 0, oracle weights 100",
            xlim=(-150, 150),
        )
    figure.savefig(path, metadata=_WITHOUT_DATE)
    plt.close(figure)
