"""What all pictures have in common: size, letters, colours, grids of numbers, and how they get into a file.

A picture is 8 inches wide at 150 dots an inch. Shown 800 pixels wide, as in a column of text, 8 points of letter
height are then 11 pixels. The colours are Okabe & Ito's, as in :mod:`minunet.results.plots`, which people with any
common kind of colour vision tell apart; quantities that have a sign go from blue over white to vermilion.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image

from minunet.results.overlays import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "RC", "SIGNED", "SKY", "VERMILION", "YELLOW"]

GREY = "#555555"
PALE_GREY = "#E6E6E6"
#: For quantities with a sign; 0 is white.
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, "white", VERMILION])

WIDTH = 8.0  # inches
DPI = 150  # of a still
COARSE_DPI = 100  # 800 pixels wide: of an animation, and of many small images, which would take too many bytes
LARGEST = 280_000  # bytes of a PNG

#: The matplotlib settings under which every picture is built.
RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "text.parse_math": False,
}


def light(color: str, share: float = 0.35) -> tuple[float, float, float]:
    """``color`` ("#RRGGBB") on white, as if it covered only ``share`` of it: a ground on which black text is read."""
    r, g, b = (1 - share + share * int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return r, g, b


# ---- Figures and files -----------------------------------------------------------------------------------------------


def new_figure(height: float) -> Figure:
    """An empty figure, ``height`` inches high, that arranges its axes and legends by itself."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def new_canvas(height: float) -> tuple[Figure, Axes]:
    """A figure for a drawing, and its only axes: no frame, in inches from the bottom left."""
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, height))
    ax.set_axis_off()
    return figure, ax


def rendered(figure: Figure, dpi: int) -> Image.Image:
    """The picture of ``figure``, RGB."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write ``figure`` as a PNG; with 256 colours if it would be larger than ``LARGEST`` with all of them."""
    picture = rendered(figure, dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", optimize=True)
    if path.stat().st_size > LARGEST:
        _quantized(picture, 256).save(path, format="PNG", optimize=True)


def _quantized(picture: Image.Image, colors: int) -> Image.Image:
    """``picture`` with a palette of ``colors``. What is almost white in it becomes white: median cut takes means."""
    picture = picture.quantize(colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette = np.array(picture.getpalette()).reshape(-1, 3)
    palette[palette.min(axis=1) > 248] = 255
    picture.putpalette(palette.ravel().tolist())
    return picture


def save_animation(figures: Sequence[Figure], seconds: Sequence[float], path: Path) -> None:
    """Write ``figures`` as a GIF that goes round and round, each shown for its number of ``seconds``."""
    frames = [rendered(figure, COARSE_DPI) for figure in figures]
    # One palette for all, from the last frame, which shows all that the others do: colours do not flicker.
    palette = _quantized(frames[-1], 128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    durations = [round(1000 * s) for s in seconds]
    frames[0].save(
        path, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False
    )


# ---- Grids of numbers ------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """``value`` as short as it can be said, with a minus that is as long as a plus.

    >>> number(-2.0), number(0.25)
    ('−2', '0.25')
    """
    return f"{value:g}".replace("-", "−")


def power_of_ten(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis, without mathematical type setting.

    >>> power_of_ten(0.001), power_of_ten(1.0)
    ('1e−3', '1')
    """
    return f"1e{number(np.log10(value).round(6))}" if value < 0.999 else f"{value:g}"


def grid(
    ax: Axes,
    values: np.ndarray,
    left: float,
    top: float,
    *,
    cell: float = 0.42,
    title: str = "",
    fill: dict[tuple[int, int], Any] | None = None,
    shown: np.ndarray | None = None,
    digits: str = "",
    fontsize: float = 10,
) -> None:
    """Draw the matrix ``values`` (rows, columns) as squares of side ``cell`` with its numbers in them.

    ``left`` and ``top`` are its corner in the units of ``ax``. ``fill`` has the ground of some cells; where ``shown``
    is False a cell is empty. ``digits`` is a format such as ".1f", else numbers are as short as they can be.
    """
    rows, columns = values.shape
    for i in range(rows):
        for j in range(columns):
            x, y = left + j * cell, top - (i + 1) * cell
            ground = (fill or {}).get((i, j), "white")
            ax.add_patch(Rectangle((x, y), cell, cell, facecolor=ground, edgecolor=GREY, linewidth=0.8))
            if shown is None or shown[i, j]:
                text = f"{values[i, j]:{digits}}".replace("-", "−") if digits else number(values[i, j])
                ax.text(x + cell / 2, y + cell / 2, text, ha="center", va="center", fontsize=fontsize)
    if title:
        ax.text(left + columns * cell / 2, top + 0.1, title, ha="center", va="bottom", fontsize=9.5)


def frame(
    ax: Axes, left: float, top: float, rows: slice, columns: slice, color: str, cell: float = 0.42, inset: float = 0.0
) -> None:
    """A coloured frame around the cells ``rows``, ``columns`` of the grid that begins at ``left``, ``top``."""
    width, height = (columns.stop - columns.start) * cell, (rows.stop - rows.start) * cell
    corner = (left + columns.start * cell + inset, top - rows.stop * cell + inset)
    ax.add_patch(
        Rectangle(corner, width - 2 * inset, height - 2 * inset, fill=False, edgecolor=color, linewidth=2.5, zorder=3)
    )


def arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str = GREY,
    *,
    width: float = 1.6,
    style: str = "-|>",
    bend: str = "arc3,rad=0",
    line: str = "-",
) -> None:
    """An arrow from ``start`` to ``end``; ``bend`` is a matplotlib connection style."""
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle=style,
            mutation_scale=11,
            color=color,
            linewidth=width,
            linestyle=line,
            connectionstyle=bend,
            shrinkA=0,
            shrinkB=0,
        )
    )


def bare(ax: Axes) -> None:
    """No ticks, grid or frame: for an image."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
