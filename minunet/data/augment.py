"""Augmentation: each training image is shown a little differently every time, and its mask with it.

A flip, a rotation and a zoom are one affine map, so the image is resampled once: the output pixel at place q,
measured from the centre, takes its value from the place ``matrix @ q`` of the input. Image and mask go through
the same map, of ONE draw: a mask that stays where it was while its image turns teaches the network noise
(``masks=False`` does that on purpose: the reference system did).

Everything drawn is a function of a key (minunet.base.rng), on the CPU; the pixels are moved on the device where
they are.
"""

import math
from dataclasses import dataclass

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array, array_module


@dataclass(frozen=True)
class Augmentation:
    """How much an image may change; 0 leaves a part out. The geometry moves image and mask, the rest the image alone.

    Intensities are in units of the normalised image: 1 is a standard deviation of the volume, if it was z-scored.

    Raises ValueError for values out of range.
    """

    flip_horizontal: float = 0.0  # probability
    flip_vertical: float = 0.0  # probability
    rotation: float = 0.0  # degrees, drawn from [-rotation, rotation]
    zoom: float = 0.0  # height and width each grow by a factor from [1 - zoom, 1 + zoom]
    brightness: float = 0.0  # added: from [-brightness, brightness]
    contrast: float = 0.0  # the distance from the image's mean grows by a factor from [1 - contrast, 1 + contrast]
    gamma: float = 0.0  # the range of the image is bent by an exponent from [1 - gamma, 1 + gamma]
    noise: float = 0.0  # standard deviation of what is added to each value, drawn from [0, noise]
    blur: float = 0.0  # the share of a pixel that its neighbours get, drawn from [0, blur]

    def __post_init__(self) -> None:
        for name in ("flip_horizontal", "flip_vertical", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("zoom", "contrast", "gamma"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("rotation", "brightness", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")


#: Named choices. "reference" has the reference system's ranges, "mild" suits a head that stands upright,
#: "strong" adds the differences between scanners.
PRESETS = {
    "none": Augmentation(),
    "reference": Augmentation(flip_horizontal=0.5, flip_vertical=0.5, rotation=72.0, zoom=0.2),
    "mild": Augmentation(flip_horizontal=0.5, rotation=15.0, zoom=0.1),
    "strong": Augmentation(
        flip_horizontal=0.5,
        rotation=15.0,
        zoom=0.2,
        brightness=0.3,
        contrast=0.25,
        gamma=0.3,
        noise=0.1,
        blur=0.5,
    ),
}


class PixelPasses:
    """What is done to all pixels of a batch by what was drawn: the passes over memory that a GPU has kernels for.

    This is what they compute. An engine (minunet.engines) may compute it faster.
    """

    def warp(self, images: Array, masks: Array, matrices: np.ndarray) -> tuple[Array, Array]:
        """``images`` (N, H, W, C) and ``masks`` (N, H, W, K) of any dtype, both moved by ``matrices`` (N, 2, 2)."""
        row, column = _source_places(images, matrices)
        return _interpolated(images, row, column), _nearest(masks, row, column)

    def add_noise(self, images: Array, strength: Array, key: rng.Key) -> Array:
        """``images`` plus ``strength`` (N, 1, 1, 1) times a standard normal number for each value.

        The numbers of image n are those of the stream ``rng.NOISE`` of ``key.image + n``.
        """
        keys = [key._replace(stream=rng.NOISE, image=key.image + n) for n in range(len(images))]
        noise = np.stack([rng.standard_normal(one, images[0].size) for one in keys]).reshape(images.shape)
        return images + strength * array_module(images).asarray(noise.astype(images.dtype))


PLAIN = PixelPasses()


def augment(
    images: Array,
    masks: Array,
    augmentation: Augmentation,
    key: rng.Key,
    *,
    move_masks: bool = True,
    passes: PixelPasses = PLAIN,
) -> tuple[Array, Array]:
    """Augmented copies of ``images`` (N, H, W, C), float, and ``masks`` (N, H, W, K), by what ``key`` draws.

    Image n of the batch is drawn by ``key.image + n``. What comes from outside of the image is its reflection.
    Images are interpolated linearly; masks take the nearest pixel, so they keep their values and their dtype.

    >>> image = np.arange(4.0).reshape(1, 1, 4, 1)
    >>> turned, _ = augment(image, image, Augmentation(flip_horizontal=1.0), rng.Key(seed=0))
    >>> turned.ravel()
    array([3., 2., 1., 0.])
    """
    generators = [rng.generator(key._replace(stream=rng.AUGMENT, image=key.image + n)) for n in range(len(images))]
    matrices = np.stack([draw_matrix(augmentation, generator) for generator in generators])
    if np.array_equal(matrices, np.broadcast_to(np.eye(2), matrices.shape)):
        moved_images, moved_masks = images.copy(), masks.copy()
    else:
        moved_images, moved_masks = passes.warp(images, masks, matrices)
        if not move_masks:
            moved_masks = masks.copy()
    return change_intensity(moved_images, augmentation, generators, key, passes), moved_masks


def draw_matrix(augmentation: Augmentation, generator: np.random.Generator) -> np.ndarray:
    """One affine map from output to input places: float64 (2, 2), acting on (row, column) from the centre.

    All five numbers are always drawn, so that leaving one part out does not change the draws of the others.
    """
    flip_vertical, flip_horizontal = generator.random(2) < (augmentation.flip_vertical, augmentation.flip_horizontal)
    angle = math.radians(generator.uniform(-1, 1) * augmentation.rotation)
    growth = 1 + generator.uniform(-1, 1, size=2) * augmentation.zoom
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    flip = np.diag([-1.0 if flip_vertical else 1.0, -1.0 if flip_horizontal else 1.0])
    return flip @ rotation @ np.diag(1 / growth)  # what grows in the output reads a smaller part of the input


def _source_places(images: Array, matrices: np.ndarray) -> tuple[Array, Array]:
    """For each output pixel the row and the column (N, H, W) of the input where its value comes from."""
    xp = array_module(images)
    _, height, width, _ = images.shape
    row = xp.arange(height)[:, None] - (height - 1) / 2
    column = xp.arange(width)[None, :] - (width - 1) / 2
    m = xp.asarray(matrices)[:, :, :, None, None]
    # Rounded to 1e-9 of a pixel: a quarter turn then hits the pixels, and not just beside them.
    source_row = xp.round(m[:, 0, 0] * row + m[:, 0, 1] * column, 9) + (height - 1) / 2
    source_column = xp.round(m[:, 1, 0] * row + m[:, 1, 1] * column, 9) + (width - 1) / 2
    return source_row, source_column


def _interpolated(images: Array, row: Array, column: Array) -> Array:
    """The values of ``images`` at places (N, H, W) between the pixels: linear along both axes, of four neighbours.

    Channel by channel, so that NumPy's innermost loops run along the rows, and in place, so that they find in the cache
    what they need.
    """
    xp = array_module(images)
    _, _, width, channels = images.shape
    above, before = xp.floor(row), xp.floor(column)
    below, after = (row - above).astype(images.dtype), (column - before).astype(images.dtype)
    above_share, before_share = 1 - below, 1 - after
    top, bottom = _row_starts(images, above), _row_starts(images, above + 1)
    left, right = _reflect(before, width), _reflect(before + 1, width)
    corners = (top + left, top + right, bottom + left, bottom + right)
    moved = xp.empty_like(images)
    for c in range(channels):
        pixels = images[..., c].ravel()
        upper, upper_right, lower, lower_right = (pixels.take(corner) for corner in corners)
        for near, far in ((upper, upper_right), (lower, lower_right)):
            near *= before_share
            far *= after
            near += far
        upper *= above_share
        lower *= below
        upper += lower
        moved[..., c] = upper
    return moved


def _nearest(images: Array, row: Array, column: Array) -> Array:
    """The values of ``images``, of any dtype, at places (N, H, W), each that of the nearest pixel."""
    xp = array_module(images)
    _, _, width, channels = images.shape
    nearest = _row_starts(images, xp.floor(row + 0.5)) + _reflect(xp.floor(column + 0.5), width)
    return images.reshape(-1, channels).take(nearest, axis=0)


def _row_starts(images: Array, row: Array) -> Array:
    """The number, among all pixels of ``images``, of the first pixel of each row: whole numbers (N, H, W)."""
    n, height, width, _ = images.shape
    first = array_module(images).arange(n)[:, None, None] * (height * width)
    return first + _reflect(row, height) * width


def _reflect(place: Array, size: int) -> Array:
    """Places folded into [0, size): 2 1 0 | 0 1 2 ... and so on, the border pixel being its own neighbour."""
    place = place.astype("int32")
    place -= place // (2 * size) * (2 * size)  # the remainder: % would take longer than all three
    return array_module(place).minimum(place, 2 * size - 1 - place)


def change_intensity(
    images: Array,
    augmentation: Augmentation,
    generators: list[np.random.Generator],
    key: rng.Key,
    passes: PixelPasses = PLAIN,
) -> Array:
    """``images`` (N, H, W, C) with gamma, contrast, brightness, blur and noise as drawn; the same array without any.

    Gamma works on each image and channel scaled to [0, 1] and back. The generators draw how strong each change is,
    ``key`` the noise.
    """
    xp = array_module(images)

    def draw(amount: float) -> Array:
        """One number an image, from [-amount, amount], (N, 1, 1, 1)."""
        values = np.array([generator.uniform(-1, 1) for generator in generators]) * amount
        return xp.asarray(values.astype(images.dtype)[:, None, None, None])

    def over_pixels(images: Array, method: str) -> Array:
        """The min, max or mean of each image and channel, as often as a row has pixels, (N, 1, W, C).

        So, and one axis after the other, NumPy's innermost loops run along a row, and not over the channels of a pixel.
        """
        row = getattr(images, method)(axis=1, keepdims=True)
        row[...] = getattr(row, method)(axis=2, keepdims=True)
        return row

    if augmentation.gamma:
        low = over_pixels(images, "min")
        extent = over_pixels(images, "max") - low
        extent = xp.where(extent > 0, extent, images.dtype.type(1))
        images = ((images - low) / extent) ** (1 + draw(augmentation.gamma)) * extent + low
    if augmentation.contrast or augmentation.brightness:
        mean = over_pixels(images, "mean")
        images = (images - mean) * (1 + draw(augmentation.contrast)) + mean + draw(augmentation.brightness)
    if augmentation.blur:
        share = abs(draw(augmentation.blur)) / 2
        for axis in (1, 2):
            images = (1 - share) * images + share * _neighbours_mean(images, axis)
    if augmentation.noise:
        images = passes.add_noise(images, abs(draw(augmentation.noise)), key)
    return images


def _neighbours_mean(images: Array, axis: int) -> Array:
    """The mean of the pixels before and after along ``axis``; at the border a pixel is its own neighbour."""
    xp = array_module(images)
    place, last = xp.arange(images.shape[axis]), images.shape[axis] - 1
    before, after = xp.maximum(place - 1, 0), xp.minimum(place + 1, last)
    return (images.take(before, axis=axis) + images.take(after, axis=axis)) / 2
