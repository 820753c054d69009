"""The figures of docs/quality.md. SVG, by matplotlib.

Reward against KL, the gap that each family closes, how held-out labels rank families, and those of close looks: rewards of
chosen and rejected responses over steps, and win rates by sampling temperature.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.quality.methods import DPO, ORACLE
from benchmarks.quality.summary import chosen_rewards, read_runs
from pipeline.toy.policy_table import reward_at_kl
from train.plots import Curve, Panel, draw_panels

mpl.use("svg")
mpl.rcParams |= {
    "svg.hashsalt": "tokenweights",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

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


def _panels(number: int, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels in two columns, each row as high as its highest panel, in inches."""
    rows = [max(heights[i : i + 2]) for i in range(0, number, 2)]
    shape = {"figsize": (4.9 * min(number, 2), sum(rows)), "layout": "constrained", "height_ratios": rows}
    figure, axes = plt.subplots(len(rows), min(number, 2), squeeze=False, **shape)
    for ax in axes.flat[number:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:number])


def draw_curves(worlds: Mapping[str, Sequence[Path]], kls: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw true reward against KL for each world: means over seeds, of the setting that is best at the middle KL."""
    figure, axes = _panels(len(worlds), [3.4] * len(worlds))
    for ax, (world, paths) in zip(axes, worlds.items(), strict=True):
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
    gaps = {
        world: {
            name: gap
            for name, row in summary["rows"].items()
            if name not in (DPO, ORACLE)
            and math.isfinite((gap := row["at_kl"][f"{kls[world][1]:g}"]["gap_closed"])["percent"])
        }
        for world, summary in summaries.items()
    }
    figure, axes = _panels(len(gaps), [0.8 + 0.17 * max(len(found), 4) for found in gaps.values()])
    for index, (ax, (world, found)) in enumerate(zip(axes, gaps.items(), strict=True)):
        most = max(map(len, list(gaps.values())[index // 2 * 2 :][:2]))  # bars of neighbours are equally wide
        names = sorted(found, key=lambda name: found[name]["percent"])
        if not names:  # its runs have only begun
            ax.set(title=world)
            continue
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
            ylim=(len(names) - most - 0.6, len(names) - 0.4),
        )
    figure.savefig(path, metadata=_WITHOUT_DATE)
    plt.close(figure)


def draw_ranking(summaries: Mapping[str, Any], kls: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the gap that families close at the middle KL against how well their scores predict held-out labels."""
    figure, axes = _panels(len(summaries), [3.8] * len(summaries))
    found: list[dict[str, tuple[float, float, float]]] = []
    for ax, (world, summary) in zip(axes, summaries.items(), strict=True):
        found.append({})
        for name, row in summary["rows"].items():
            gap = row["at_kl"][f"{kls[world][1]:g}"]["gap_closed"]
            if row["scores"] and not row["scores"]["in_sample"] and math.isfinite(gap["percent"]):
                x, y, half = found[-1][name] = row["scores"]["log_likelihood"], gap["percent"], gap["half_width"]
                ax.errorbar(x, y, half, color=SHOWN.get(name, "tab:gray"), fmt="o", ms=5, elinewidth=0.7, alpha=0.9)
        ax.axhline(0, color="black", lw=0.8)
        ax.axvline(-math.log(2), color="tab:gray", lw=0.8, ls=":")
        ax.margins(x=0.15)
        ax.set(
            title=f"{world}, KL {kls[world][1]:g}",
            xlabel="held-out log-likelihood, nats a pair (dotted: chance)",
            ylabel="gap closed, %: DPO 0, oracle weights 100",
            ylim=(-110, 160),
        )
    figure.draw_without_rendering()  # settles the layout
    for ax, places in zip(axes, found, strict=True):
        _label(ax, dict(sorted(places.items(), key=lambda item: [*SHOWN, item[0]].index(item[0]))))
    figure.savefig(path, metadata=_WITHOUT_DATE)
    plt.close(figure)


def _label(ax: Any, places: Mapping[str, tuple[float, float, float]]) -> None:
    """Write names next to points with error bars, the first ones first; a name without room for it is left out."""
    taken = [
        ax.transData.transform([(x, y - half), (x, y + half)]) + np.array([[-4, -4], [4, 4]])
        for x, y, half in places.values()
    ]
    frame = ax.get_window_extent()
    for name, (x, y, _) in places.items():
        for shift, left, below in _LABEL_PLACES:
            text = ax.annotate(name, (x, y), shift, textcoords="offset points", ha=left, va=below, fontsize=8)
            text.set_color(SHOWN.get(name, "dimgray"))
            text.set_in_layout(False)
            box = text.get_window_extent().get_points()
            inside = (box[0] > frame.p0).all() and (box[1] < frame.p1).all()
            if inside and not any((box[0] < other[1]).all() and (other[0] < box[1]).all() for other in taken):
                taken.append(box)
                break
            text.remove()


_LABEL_PLACES = [
    ((6, 0), "left", "center"),
    ((-6, 0), "right", "center"),
    ((5, 4), "left", "bottom"),
    ((5, -4), "left", "top"),
    ((-5, 4), "right", "bottom"),
    ((-5, -4), "right", "top"),
    ((0, 9), "center", "bottom"),
    ((0, -9), "center", "top"),
]
"""Where a label may stand: its distance from the point, in points, and how it is aligned there."""


def draw_steps(looks: Mapping[str, Any], path: Path) -> None:
    """Draw how the log-ratios of chosen and rejected responses change in training, on its own pairs and on others."""
    grid = [
        [_steps_panel(world, families, row, title) for world, families in looks.items()]
        for row, title in (("train", "training pairs"), ("unseen", "other pairs"))
    ]
    path.write_bytes(draw_panels(grid, "svg", styles={"chosen": False, "rejected": True}, colours=SHOWN))


def _steps_panel(world: str, families: Mapping[str, Any], row: str, title: str) -> Panel:
    curves = []
    for family, look in families.items():
        for side in ("chosen", "rejected"):
            # Over beta, which differs from family to family.
            means = [mean / look["beta"] for mean, _ in look["rewards"][row][side]]
            curves.append(Curve(family, look["steps"], means, is_dashed=side == "rejected"))
    x_label = "steps" if row == "unseen" else ""
    return Panel(f"{world}: {title}", x_label, "log π − log ref, nats a response", curves, scale=world)


def draw_wins(looks: Mapping[str, Any], path: Path) -> None:
    """Draw how often responses have a higher true reward than DPO's, by sampling temperature; bands are 95 % over seeds."""
    panels = []
    for world, families in looks.items():
        curves = []
        for family, look in families.items():
            if "wins" in look:
                means, halves = 100 * np.array([*look["wins"].values()], float).T
                band = halves if np.isfinite(halves).all() else None  # one seed has no interval
                temperatures = [*map(float, look["wins"])]
                curves.append(Curve(family, temperatures, means, is_marked=True, half_widths=band))
        if curves:
            y_label = "" if panels else "win rate against DPO, %"
            shown = {"level": 50.0, "scale": "wins", "x_ticks": curves[0].x}
            panels.append(Panel(world, "sampling temperature", y_label, curves, **shown))
    if panels:
        path.write_bytes(draw_panels([panels], "svg", styles={}, colours=SHOWN, panel_size=(4.6, 3.2)))
