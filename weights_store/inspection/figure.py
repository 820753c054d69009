"""Figures as SVG or PNG, drawn by matplotlib: the heat maps of this folder and the curves of `train/plots.py`.

matplotlib is in the extra `plot`, and loads when a figure is drawn. The same input gives the same bytes: a figure has no date,
no random ids, and nothing of the user's own matplotlib settings.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from weights_store.errors import InputError, MissingExtraError
from weights_store.packages import how_to_install

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["svg", "png"]
_STYLE = {
    "svg.hashsalt": "tokenweights",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_METADATA: dict[Format, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": "tokenweights"},
    "png": {"Software": "tokenweights"},
}
"""The name tells our files from the user's own, see `commands/output.py`."""
_DOTS_PER_INCH = 200


def figure_format(path: str | Path) -> Format:
    """Return the format that the ending of a file's name asks for.

    Raises:
        InputError: It is neither `.svg` nor `.png`.
    """
    ending = Path(path).suffix.lower()
    if ending not in (".svg", ".png"):
        raise InputError(f"cannot draw {str(path)!r}: a figure is written as .svg or .png; got the ending {ending!r}")
    return cast(Format, ending[1:])


def draw_figure(
    draw: "Callable[[Figure], None]",
    format: Format,
    size: tuple[float, float],
    layout: Literal["constrained"] | None = None,
) -> bytes:
    """Return a figure of `size` (width, height) in inches, after `draw` has drawn on it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"a figure needs the package 'matplotlib', which is not installed; {how_to_install('matplotlib', 'plot')}"
        ) from error
    file = BytesIO()
    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=size, layout=layout)
        draw(figure)
        figure.savefig(file, format=format, dpi=_DOTS_PER_INCH, metadata=_METADATA[format])
    return file.getvalue()
