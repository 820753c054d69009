"""Figures of trainings: rewards, margins and accuracy over steps, of one run or several side by side.

`tokenweights plot` calls `draw_runs`; the quality benchmark draws its own curves with the same `draw_panels`. Reads the files
that a training wrote (`job/output.py`), and loads no torch. matplotlib is in the extra `plot`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.job.output import METRICS, RECORD, OutputFolder
from weights_store.errors import InputError
from weights_store.fingerprint import load_json
from weights_store.inspection.figure import Format, draw_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
"""Okabe and Ito's without the yellow, which is too pale for a line: colour-blind people can tell them apart."""
_MARKERS = "os^DvPX*"
"""One for each colour, for prints in black and white."""
_NUM_MARKS = 8
"""About so many markers stand on a curve whose points are not marked one by one."""
_REWARD = "reward: β (log π − log ref)"
_PANELS = (
    ("rewards/chosen", "chosen responses", _REWARD, 1.0, 0.0),
    ("rewards/rejected", "rejected responses", _REWARD, 1.0, 0.0),
    ("rewards/margins", "margin: chosen − rejected", "difference of the rewards", 1.0, 0.0),
    ("rewards/accuracies", "accuracy: chosen above rejected", "% of the pairs", 100.0, 50.0),
)
"""Metric, title, unit, factor from the metric to that unit, and the value of a model that has learnt nothing."""
_TRAINING, _HELD_OUT = "in training", "held out"


@dataclass(frozen=True)
class Curve:
    """One line of a panel. `x`, `y` and `half_widths` have one entry per point."""

    name: str
    """What it belongs to, for example a run: curves of one name have one colour in all panels."""
    x: Sequence[float]
    y: Sequence[float]
    is_dashed: bool = False
    is_marked: bool = False
    """Whether every point has a marker."""
    half_widths: Sequence[float] | None = None
    """Half the height of a band around the line, for example a 95 % interval."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    level: float = 0.0
    """Where a thin horizontal line is drawn."""
    scale: str = ""
    """Panels with the same text have the same y-axis; an empty one stands alone."""
    x_ticks: Sequence[float] | None = None


@dataclass(frozen=True)
class Run:
    """What one training has logged so far: values by metric and step, as `rewards/chosen`."""

    label: str
    training: Mapping[str, Mapping[int, float]]
    """Means over the pairs since the log before."""
    held_out: Mapping[str, Mapping[int, float]]
    """Means over the same held-out pairs each time; empty if nothing is held out."""


def draw_runs(folders: Sequence[str | Path], format: Format) -> bytes:
    """Return a figure of the rewards, margins and accuracies of trainings, by their output folders.

    The rewards are those of unweighted sums of log-ratios, whatever the loss, so that runs can be compared (TIS-DPO's figure 3,
    arXiv 2410.04350, compares such rewards).

    Raises:
        InputError: A folder was not made by a training, has logged nothing yet, or has a loss without rewards; or there are
            more runs than colours.
        MissingExtraError: matplotlib is not installed.
    """
    runs = read_runs(folders)
    grid: list[list[Panel]] = [[], []]
    for index, (metric, title, unit, factor, level) in enumerate(_PANELS):
        curves = []
        for run in runs:
            for values, is_held_out in ((run.training, False), (run.held_out, True)):
                if points := values.get(metric):
                    y = [factor * value for value in points.values()]
                    curves.append(Curve(run.label, list(points), y, is_dashed=is_held_out, is_marked=is_held_out))
        x_label = "steps" if index > 1 else ""
        grid[index // 2].append(Panel(title, x_label, unit, curves, level, scale=unit))
    styles = {_TRAINING: False, _HELD_OUT: True} if any(run.held_out for run in runs) else {}
    return draw_panels(grid, format, styles=styles)


# --- reading -----------------------------------------------------------------------------------------------------------


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Return what trainings have logged, with labels that differ: see `draw_runs`."""
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    if len(paths) > len(COLOURS):
        raise InputError(
            f"{len(paths)} runs: expected at most {len(COLOURS)}, the number of colours that differ clearly"
        )
    labels = [_label(path) for path in paths]
    is_taken = Counter(labels)
    labels = [
        f"{label}, {path.name}" if is_taken[label] > 1 else label for label, path in zip(labels, paths, strict=True)
    ]
    if len(set(labels)) < len(labels):
        labels = [f"{_label(path)}, {path}" for path in paths]
    return [_read_run(path, label) for path, label in zip(paths, labels, strict=True)]


def _label(folder: Path) -> str:
    """Return the loss and the weight dataset of a run, from its record."""
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} has no {RECORD}: expected the output folder of `tokenweights train`")
    identity = load_json(folder / RECORD).get("identity", {})
    try:
        loss, weights = identity["loss"], identity["weights"]["name"]
        beta = f" β {loss['beta']:g}" if "beta" in loss else ""
        nll = f" + {loss['nll_lambda']:g} NLL" if loss.get("nll_lambda") else ""
        return f"{loss['name']}{beta}{nll}, {weights}"
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / RECORD} is damaged: its identity is not what a training writes") from error


def _read_run(folder: Path, label: str) -> Run:
    history = _history(folder) if (folder / METRICS).is_file() else _history_so_far(folder)
    training: dict[str, dict[int, float]] = {}
    held_out: dict[str, dict[int, float]] = {}
    for metric, *_ in _PANELS:
        for values, name in ((training, metric), (held_out, f"eval_{metric}")):
            if points := {line["step"]: line[name] for line in history if name in line}:
                values[metric] = dict(sorted(points.items()))
    if not training:
        raise InputError(
            f"{folder} has logged no rewards in {len(history)} lines; expected `rewards/chosen` and so on, which every loss "
            "with a reference logs"
        )
    return Run(label, training, held_out)


def _history(folder: Path) -> list[dict[str, Any]]:
    """Return the log of a finished training, with the held-out measurement of the model that it saved."""
    metrics = load_json(folder / METRICS)
    history, step = metrics.get("history"), metrics.get("best_step", metrics.get("steps"))
    if not isinstance(history, list) or not isinstance(step, int):
        raise InputError(f"{folder / METRICS} is damaged: expected the steps and the history that a training writes")
    held_out = {f"eval_{name}": value for name, value in metrics.get("held_out", {}).items()}
    return [*history, {"step": step} | held_out]


def _history_so_far(folder: Path) -> list[dict[str, Any]]:
    """Return the log in the newest checkpoint of a training that is not finished."""
    states = OutputFolder(folder).checkpoints.glob("checkpoint-*/trainer_state.json")  # the Trainer writes it last
    newest = max(states, key=lambda path: int(path.parent.name.rpartition("-")[2]), default=None)
    if newest is None:
        raise InputError(
            f"{folder} is not finished and has no checkpoint, so nothing that it logged is on disk yet; wait until it is "
            "finished, or train with output.save_every_steps"
        )
    return list(load_json(newest).get("log_history", []))


# --- drawing -----------------------------------------------------------------------------------------------------------


def draw_panels(
    grid: Sequence[Sequence[Panel]],
    format: Format,
    *,
    styles: Mapping[str, bool],
    colours: Mapping[str, str] | None = None,
    panel_size: tuple[float, float] = (4.7, 2.6),
) -> bytes:
    """Return a figure of rows of panels, with one legend for all of them below.

    Args:
        grid: By row; all rows have the same number of panels.
        format: Of the file.
        styles: What solid (False) and dashed (True) lines mean, for the legend.
        colours: By name of the curves; None for those of `COLOURS`, in order, each with a marker of its own.
        panel_size: Width and height of one panel, inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names = dict.fromkeys(curve.name for row in grid for panel in row for curve in panel.curves)
    looks = {
        name: {"color": colour, "marker": marker}
        for name, colour, marker in zip(names, COLOURS, _MARKERS, strict=False)
    }
    if colours is not None:
        looks = {name: {"color": colours[name], "marker": "o"} for name in names}

    def draw(figure: "Figure") -> None:
        axes = figure.subplots(len(grid), len(grid[0]), squeeze=False, sharex="col")
        of_scale: dict[str, Axes] = {}
        for panels, row in zip(grid, axes, strict=True):
            for panel, ax in zip(panels, row, strict=True):
                _draw_panel(ax, panel, looks, marks=colours is None)
                if panel.scale in of_scale:
                    ax.sharey(of_scale[panel.scale])
                elif panel.scale:
                    of_scale[panel.scale] = ax
        _draw_legend(figure, looks, styles, marks=colours is None)

    width, height = panel_size
    legend_inches = 0.25 * (1 + len(names) // 2)
    return draw_figure(draw, format, (width * len(grid[0]), height * len(grid) + legend_inches), "constrained")


def _draw_panel(ax: "Axes", panel: Panel, looks: Mapping[str, Mapping[str, str]], *, marks: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.axhline(panel.level, color="black", lw=0.6)
    for index, curve in enumerate(panel.curves):
        look = looks[curve.name]
        every = max(1, len(curve.x) // _NUM_MARKS)
        start = index % every  # so that the markers of curves on top of each other do not cover each other
        ax.plot(
            curve.x,
            curve.y,
            "--" if curve.is_dashed else "-",
            color=look["color"],
            marker=look["marker"] if marks or curve.is_marked else None,
            markevery=1 if curve.is_marked else (start, every),
            markerfacecolor=look["color"] if curve.is_marked else "white",
            ms=4,
            lw=1.4,
        )
        if curve.half_widths is not None:
            low, high = (
                [y + sign * half for y, half in zip(curve.y, curve.half_widths, strict=True)] for sign in (-1, 1)
            )
            ax.fill_between(curve.x, low, high, color=look["color"], alpha=0.12, lw=0)
    if not panel.curves:  # accuracies of rows with one response
        ax.text(0.5, 0.75, "nothing was logged", ha="center", color="gray", transform=ax.transAxes)
    ax.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.x_ticks is not None:
        ax.set_xticks(panel.x_ticks)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # steps


def _draw_legend(
    figure: "Figure", looks: Mapping[str, Mapping[str, str]], styles: Mapping[str, bool], *, marks: bool
) -> None:
    from matplotlib.lines import Line2D

    lines: list[Line2D] = [
        Line2D([], [], color=look["color"], marker=look["marker"] if marks else None, ms=4, lw=1.4, label=name)
        for name, look in looks.items()
    ]
    lines += [
        Line2D([], [], color="gray", ls="--" if is_dashed else "-", lw=1.4, label=name)
        for name, is_dashed in styles.items()
    ]
    longest = max((len(str(line.get_label())) for line in lines), default=1)
    columns = min(4, max(1, int(16 * figure.get_figwidth()) // (longest + 6)))
    legend = figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder may have a dollar sign in its name
