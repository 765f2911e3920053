"""winograd_error.png: what Winograd's filtering costs in digits, and what that is beside the noise of a batch.

Above: the error of a 3 x 3 convolution in float32, against the same numbers in float64, by the number of channels. Once
with the filter transformed down the columns only, as :mod:`minunet.engines.cpu.rows` does it, once in both directions,
as :mod:`minunet.engines.cpu.tiles` does it; for F(2, 3), F(4, 3) and F(6, 3), and for the plain sum of nine products.

Below: the gradients of a U-Net in float32, by the plain path and by the CPU engine, against the plain path in float64;
and how much the gradients of different batches differ from one another.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view

from docs.figures import style
from docs.figures.style import BLUE, GREEN, GREY, VERMILION
from docs.figures.trained import NORMALIZATION
from minunet import SegmentationLoss, UNet
from minunet.base.rng import Key
from minunet.data import phantom
from minunet.data.batches import Batch, prepare_batch
from minunet.engines.cpu import winograd
from minunet.engines.cpu.engine import CpuEngine
from minunet.network.layers import Arrays, map_arrays
from minunet.training.step import loss_and_grads

#: The finite points of F(2, 3), F(4, 3) and F(6, 3), by the number of outputs; infinity comes last in each.
POINTS: dict[int, tuple[float, ...]] = {
    2: (0, 1, -1),
    4: (0, 1, -1, 2, -2),
    6: (0, 1, -1, 2, -2, 0.5, -0.5),
}
COLORS = {1: GREY, 2: GREEN, 4: BLUE, 6: VERMILION}
# So few that the products are small, as in the engine: for larger ones OpenBLAS adds up in another order, less exactly.
TILES, FILTERS, SEEDS = 16, 8, 16
EPSILON = float(np.finfo("float32").eps) / 2  # the largest relative error of one rounding


class Transforms(NamedTuple):
    """B^T, G and A^T of F(m, 3), float64."""

    inputs: np.ndarray  # (m + 2, m + 2)
    filters: np.ndarray  # (m + 2, 3)
    outputs: np.ndarray  # (m, m + 2)


def transforms(outputs: int) -> Transforms:
    """Those of F(``outputs``, 3): minunet's own for 4 outputs, else derived as docs/engines/winograd.md does it."""
    if outputs == winograd.OUTPUTS:
        own = winograd.matrices("float64")
        return Transforms(own.inputs, own.filters, own.outputs)
    return from_points(POINTS[outputs])


def from_points(points: tuple[float, ...]) -> Transforms:
    """The transforms of F(m, 3) for m + 1 finite points, and infinity."""
    others = [[b for b in points if b != a] for a in points]
    factors = np.array([np.prod([a - b for b in rest]) for a, rest in zip(points, others, strict=True)])
    rows = [[*np.poly(rest)[::-1], 0] for rest in others]  # np.poly begins with the highest power
    last = [0] * (len(points) - 2) + [1]
    return Transforms(
        inputs=np.array([*rows, np.poly(points)[::-1]]),
        filters=np.vstack([np.vander(points, 3, increasing=True) / factors[:, None], [0, 0, 1]]),
        outputs=np.vstack([np.vander(points, len(last), increasing=True), last]).T,
    )


# ---- One convolution -------------------------------------------------------------------------------------------------


def direct(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The convolution of ``x`` (T, m + 2, m + 2, C) with ``w`` (3, 3, C, O), no border: (T, m, m, O)."""
    m = x.shape[1] - 2
    y = np.zeros((len(x), m, m, w.shape[3]), x.dtype)
    for u, v in np.ndindex(3, 3):
        y += x[:, u : u + m, v : v + m] @ w[u, v]
    return y


def filtered(x: np.ndarray, w: np.ndarray, directions: int) -> np.ndarray:
    """The same by F(m, 3), down the columns or in both ``directions``, step by step as the engine goes."""
    tiles, size, _, channels = x.shape
    m, filters = size - 2, w.shape[3]
    exact = transforms(m)
    b_t, a_t = exact.inputs.astype(x.dtype), exact.outputs.astype(x.dtype)
    columns = along(b_t, x, 1)
    if directions == 1:
        windows = sliding_window_view(columns, 3, axis=2)  # (T, m + 2, m, C, 3)
        planes = windows.transpose(1, 0, 2, 4, 3).reshape(size, tiles * m, 3 * channels)
        g = exact.filters.astype(x.dtype)
        sums = planes @ (g @ w.reshape(3, -1)).reshape(size, 3 * channels, filters)
        return along(a_t, sums.reshape(size, tiles, m, filters), 0).swapaxes(0, 1)
    planes = along(b_t, columns, 2).reshape(tiles, size**2, channels).swapaxes(0, 1)
    g = np.kron(exact.filters, exact.filters).astype(x.dtype)
    sums = np.ascontiguousarray(planes) @ (g @ w.reshape(9, -1)).reshape(size**2, channels, filters)
    return along(a_t, along(a_t, sums.reshape(size, size, tiles, filters), 0), 1).transpose(2, 0, 1, 3)


def along(matrix: np.ndarray, values: np.ndarray, axis: int) -> np.ndarray:
    """``matrix`` times ``values`` along one of their axes."""
    return np.moveaxis(np.tensordot(matrix, values, (1, axis)), 0, axis)


class Errors(NamedTuple):
    """Of one way to convolve in float32, means over the seeds."""

    largest: float  # the largest error, relative to the largest output
    typical: float  # the root of the mean square error, relative to that of the outputs
    by_row: np.ndarray  # (m,): the typical error of each row of a tile


def measure(outputs: int, directions: int, channels: int, tiny: bool = False) -> Errors:
    """The errors of F(``outputs``, 3) in so many directions, of the plain sum for 0, on standard normal numbers."""
    found = []
    for seed in range(1 if tiny else SEEDS):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((2 if tiny else TILES, outputs + 2, outputs + 2, channels), "float32")
        w = rng.standard_normal((3, 3, channels, FILTERS), "float32")
        truth = direct(x.astype("float64"), w.astype("float64"))
        error = (filtered(x, w, directions) if directions else direct(x, w)) - truth
        scale = np.sqrt((truth**2).mean())
        largest = np.abs(error).max() / np.abs(truth).max()
        found.append((largest, (error**2).mean(axis=(0, 2, 3)) / scale**2))
    by_row = np.mean([rows for _, rows in found], axis=0)
    return Errors(float(np.mean([large for large, _ in found])), float(np.sqrt(by_row.mean())), np.sqrt(by_row))


# ---- The gradients of a network --------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """What the gradients of a network's filters differ by, relative to their norm: (batches, layers)."""

    layers: list[str]
    engine: np.ndarray  # float32 by the CPU engine, against float64
    plain: np.ndarray  # float32 by the plain path, against float64
    noise: np.ndarray  # a batch against the mean of all, in float64
    decisions: int  # of ReLU and pooling in a batch
    flipped: list[int]  # of these, by batch, how many the plain path takes otherwise in float32


def gradients(tiny: bool = False) -> Gradients:
    """Of a U-Net before training, on batches of slices of synthetic patients."""
    widths, size, batches, batch_size = ((2, 3), 16, 2, 2) if tiny else ((32, 64, 128), 64, 6, 4)
    net, loss = UNet(widths=widths, dropout=0.0, conv_bias=False), SegmentationLoss()
    exact_net = map_arrays(net, lambda array: array.astype("float64"))
    exact, by_plain, by_engine = [], [], []
    flipped = []
    with CpuEngine(net, loss, batch_size, (size, size), workers=1) as engine:
        for step, batch in enumerate(phantom_batches(batches, batch_size, size)):
            x, target, key = batch.x, batch.target, Key(0, step=step)
            exact_x, exact_target = x.astype("float64"), target.astype("float64")
            exact.append(of_filters(loss_and_grads(exact_net, exact_x, exact_target, loss, key)[1]))
            by_plain.append(of_filters(loss_and_grads(net, x, target, loss, key)[1]))
            by_engine.append(of_filters(engine.loss_and_grads(x, target, key)[1]))
            chosen, expected = decisions(net, x), decisions(exact_net, exact_x)
            flipped.append(int((chosen != expected).sum()))
    mean = {name: np.mean([grads[name] for grads in exact], axis=0) for name in exact[0]}
    return Gradients(
        layers=list(mean),
        engine=relative(by_engine, exact),
        plain=relative(by_plain, exact),
        noise=relative(exact, [mean] * batches),
        decisions=chosen.size,
        flipped=flipped,
    )


def decisions(net: UNet, x: np.ndarray) -> np.ndarray:
    """What every ReLU let through and every pooling window chose, one after the other: all integers of the caches."""

    def found(cache: Any) -> Iterator[np.ndarray]:
        if isinstance(cache, np.ndarray) and cache.dtype.kind in "biu":
            yield cache.ravel().astype("uint8")
        elif isinstance(cache, tuple | list):
            for part in cache:
                yield from found(part)

    return np.concatenate(list(found(net.forward(x, training=True, key=Key(0))[1])))


def phantom_batches(count: int, size: int, side: int) -> Iterator[Batch]:
    """``count`` batches of ``size`` slices of ``side`` x ``side`` pixels, each slice with a tumour in it."""
    slices = phantom.make(patients=8, size=side, seed=0)
    statistics = NORMALIZATION.statistics(slices)
    with_tumour = np.flatnonzero(slices.masks.any(axis=(1, 2, 3)))
    drawn = np.random.default_rng(0).permutation(with_tumour)[: count * size]
    for indices in drawn.reshape(count, size):
        yield prepare_batch(slices, statistics, indices, "cpu")


def of_filters(grads: Arrays) -> Arrays:
    """The gradients of the 3 x 3 convolutions, as float64, in memory of their own."""
    return {
        name.removesuffix(".weight"): grad.astype("float64")
        for name, grad in grads.items()
        if name.endswith("weight") and "conv" in name
    }


def relative(found: list[Arrays], expected: list[Arrays]) -> np.ndarray:
    """The norm of the difference over the norm of what is expected: (batches, layers)."""
    return np.array(
        [
            [np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name]) for name in b]
            for a, b in zip(found, expected, strict=True)
        ]
    )


# ---- Drawing ---------------------------------------------------------------------------------------------------------

Curves = dict[tuple[int, int, int], Errors]  # by outputs, directions (0 for the plain sum) and channels


def compute(tiny: bool = False) -> Curves:
    """The errors of all ways, by the number of channels. Those of the plain sum are taken on tiles of 4 x 4."""
    ways = [(4, 0), *((outputs, directions) for outputs in POINTS for directions in (1, 2))]
    channels = (1, 2) if tiny else (1, 4, 16, 64, 256)
    return {(m, directions, c): measure(m, directions, c, tiny) for m, directions in ways for c in channels}


def draw_errors(ax: Axes, curves: Curves, directions: int) -> None:
    """The largest error over the channels, one line for each F(m, 3), and one for the plain sum."""
    channels = sorted({c for _, _, c in curves})
    for key, color, label in (
        *(((m, directions), COLORS[m], f"F({m}, 3)") for m in sorted(POINTS, reverse=True)),
        ((4, 0), COLORS[1], "plain sum"),
    ):
        values = [curves[(*key, c)].largest for c in channels]
        ax.loglog(channels, values, color=color, marker="o", markersize=4, label=label)
    ax.axhline(EPSILON, color="0.5", linestyle=":", label="one rounding")
    ax.set_xticks(channels, [str(c) for c in channels])
    ax.minorticks_off()
    where = "down the columns only" if directions == 1 else "in both directions"
    ax.set(title=f"Filtered {where}", xlabel="channels")


def draw_gradients(ax: Axes, found: Gradients) -> None:
    """The largest and the smallest difference over the batches, from the first layer to the last."""
    places = range(len(found.layers))
    for values, color, marker, label in (
        (found.noise, VERMILION, "s", "a batch against\nthe mean of all"),
        (found.engine, BLUE, "o", "float32, the engine"),
        (found.plain, GREY, "^", "float32, the plain path"),
    ):
        ax.semilogy(places, values.max(axis=0), color=color, marker=marker, markersize=5, label=label)
        ax.semilogy(places, values.min(axis=0), color=color, marker=marker, markersize=5, mfc="white", linestyle=":")
    ax.plot([], [], color="black", label="the worst batch")
    ax.plot([], [], color="black", linestyle=":", label="the best batch")
    ax.set_xticks(places, found.layers, rotation=30, ha="right")
    ax.set(title="The gradients of a U-Net's filters", ylabel="difference, relative", ylim=(1e-8, 10))
    ax.yaxis.set_major_formatter(style.power_of_ten)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def draw(curves: Curves, found: Gradients) -> Figure:
    """The errors of a convolution above, those of the gradients below."""
    figure = style.new_figure(6.8)
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, hspace=0.02)
    axes = (upper.add_subplot(1, 2, 1), upper.add_subplot(1, 2, 2))
    for directions, ax in enumerate(axes, start=1):
        draw_errors(ax, curves, directions)
        ax.yaxis.set_major_formatter(style.power_of_ten)
        ax.set_ylim(2e-8, 2e-5)
    axes[0].set_ylabel("largest error, of the largest output")
    handles, labels = axes[0].get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside lower center", ncols=5)
    draw_gradients(lower.subplots(), found)
    return figure


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw winograd_error.png into ``out``. Returns the errors, and the differences of the gradients."""
    curves, found = compute(tiny), gradients(tiny)
    style.save(draw(curves, found), out / "winograd_error.png")
    channels = sorted({c for _, _, c in curves})
    lines = [f"a 3 x 3 convolution in float32, the largest error of the largest output, by channels {channels}:"]
    for m, directions in dict.fromkeys((m, directions) for m, directions, _ in curves):
        values = " ".join(f"{curves[m, directions, c].largest:.1e}" for c in channels)
        lines.append(f"{name_of(m, directions):24} {values}")
    many = channels[-2]
    lines.append(f"typical error over that of the plain sum, {many} channels; by row of the tile:")
    base = curves[4, 0, many].typical
    for m, directions in dict.fromkeys((m, directions) for m, directions, _ in curves if directions):
        errors = curves[m, directions, many]
        rows = " ".join(f"{row / base:.1f}" for row in errors.by_row)
        lines.append(f"{name_of(m, directions):24} {errors.typical / base:4.1f}   {rows}")
    lines.append("gradients of a U-Net's filters, relative to their norm, median of the layers, by batch:")
    for label, differences in (("engine", found.engine), ("plain path", found.plain), ("noise", found.noise)):
        lines.append(f"{label:24} " + " ".join(f"{value:.1e}" for value in np.median(differences, axis=1)))
    lines.append(f"of {found.decisions:,} decisions of ReLU and pooling, the plain path in float32 takes otherwise:")
    lines.append(f"{'by batch':24} " + " ".join(f"{count:7}" for count in found.flipped))
    lines.append(f"largest ratio of the engine's error to the noise: {(found.engine / found.noise).max():.1e}")
    return lines


def name_of(outputs: int, directions: int) -> str:
    """What a way to convolve is called.

    >>> name_of(4, 2), name_of(4, 0)
    ('F(4, 3), both directions', 'plain sum')
    """
    if directions == 0:
        return "plain sum"
    return f"F({outputs}, 3), " + ("columns" if directions == 1 else "both directions")
