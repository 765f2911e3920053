"""Synthetic patients that look like LGG-MRI: the data that the examples use when they are given none.

A patient is a head in three dimensions: scalp, skull, folded cortex, white matter, ventricles, cerebellum, eyes, a
face of muscle, fat and air, and one tumour. It is *painted* from the outside inwards: each tissue is a soft weight in
[0, 1] at every point of the head, and is laid over what was there before with its grey values in the three MR
sequences. Then the scanner has its turn: uneven sensitivity of the coil, contrast, noise. The mask is where the
tumour's weight is at least one half.

Finding the tumour is meant to be neither trivial nor hopeless. It is often bright in FLAIR (channel 1), but so are the
fat of scalp and face, the caps of the ventricles and small spots in the white matter, and some tumours are hardly
brighter than their surroundings or have a dark core: no threshold finds them (``best_flair_threshold_dice`` says how
far one gets). What tells the tumour is a combination: where it lies, its size, and that it is dark before contrast.

Everything is a function of (seed, patient). The anatomy is drawn in head coordinates, so that another ``size``
shows the same head, sharper; only the noise differs.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minunet.base.errors import UserError
from minunet.base.rng import PHANTOM, Key, generator
from minunet.data.normalize import Normalization
from minunet.data.slices import LGG, SliceSet

#: Grey values of the tissues, as shares of the brightest fat: pre-contrast, FLAIR, post-contrast.
FAT = (1.00, 0.95, 1.00)
BONE = (0.10, 0.10, 0.11)
MARROW = (0.45, 0.30, 0.48)
FLUID = (0.14, 0.08, 0.15)
GREY = (0.36, 0.46, 0.39)
WHITE = (0.48, 0.38, 0.50)
MUSCLE = (0.30, 0.28, 0.36)
AIR = (0.02, 0.02, 0.02)
GLIOSIS = (0.41, 0.73, 0.43)  # scars of the white matter, harmless, and bright in FLAIR
BLOOD = (0.20, 0.15, 0.95)  # takes up the contrast agent

#: The classes of a mask with ``tissues=True``: parts of the drawing whose place is known to the pixel.
TISSUES = ("background", "head", "cerebrum", "tumour")

Field = Any  # an array, float32 (S, size, size): one number at each point of the head
Points = tuple[Field, Field, Field]  # z (-1 neck ... 1 crown), y (-1 front ... 1 back), x (-1 ... 1 across)


# ------------------------------------------------------------------------------------------ whole data sets


def make(patients: int = 24, size: int = 96, seed: int = 0, *, tissues: bool = False) -> SliceSet:
    """``patients`` synthetic patients named PHANTOM_<seed>_<number>, slices of ``size`` x ``size`` pixels.

    With ``tissues`` the masks hold the numbers of :data:`TISSUES`, else they are of the tumour alone. The images are
    the same.

    Raises ValueError if ``patients`` is below 1 or ``size`` below 16.

    >>> make(patients=2, size=16).patient_names()
    ('PHANTOM_00_0001', 'PHANTOM_00_0002')
    """
    if patients < 1:
        raise ValueError(f"patients must be at least 1, got {patients}")
    volumes = [make_patient(seed, patient, size, tissues=tissues) for patient in range(patients)]
    names = [f"PHANTOM_{seed:02d}_{patient + 1:04d}" for patient in range(patients)]
    owners = [name for name, (images, _) in zip(names, volumes, strict=True) for _ in images]
    numbers = [number for images, _ in volumes for number in range(1, len(images) + 1)]
    return SliceSet(
        images=np.concatenate([images for images, _ in volumes]),
        masks=np.concatenate([masks for _, masks in volumes]),
        patients=tuple(owners),
        numbers=tuple(numbers),
        files=tuple(f"{owner}_{number} (phantom)" for owner, number in zip(owners, numbers, strict=True)),
        words=LGG,
        classes=TISSUES if tissues else (),
    )


def write_kaggle(folder: str | os.PathLike[str], slices: SliceSet) -> None:
    """Writes ``slices`` as the Kaggle data lie on disk, so that ``reader.read_folder`` reads the same arrays back.

    Makes ``<folder>/<patient>_20260101/<patient>_20260101_<number>.tif``, uncompressed RGB, and beside it the
    ``_mask.tif``, grey, 0 and 255, or the numbers of the classes.

    Raises ValueError for a patient whose name is no name of a folder, and UserError if a patient's folder is there
    already (it may be somebody's work, or a link to it) or the system refuses.
    """
    from PIL import Image

    places = {patient: Path(folder) / f"{patient}_20260101" for patient in slices.patient_names()}
    for patient in places:
        if not patient or set(patient) & set("/\\:\0"):
            raise ValueError(f"a patient's name must be that of a folder, without / \\ : and NUL, got {patient!r}")

    def write(path: Path, pixels: np.ndarray) -> None:
        with path.open("xb") as file:
            Image.fromarray(pixels).save(file, format="TIFF")

    for place in places.values():
        if os.path.lexists(place):
            raise UserError(f"{place}: is there already, choose another folder")
    try:
        for place in places.values():
            place.mkdir(parents=True)  # a new one, so that no link lies in it
        for patient, number, image, mask in zip(
            slices.patients, slices.numbers, slices.images, slices.masks, strict=True
        ):
            place = places[patient]
            write(place / f"{place.name}_{number}.tif", image)
            write(place / f"{place.name}_{number}_mask.tif", mask[..., 0] * np.uint8(1 if slices.classes else 255))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{error.filename or folder}: cannot be written ({reason}), choose another folder") from error


def best_flair_threshold_dice(slices: SliceSet, normalization: Normalization | None = None) -> tuple[float, float]:
    """How far the simplest method gets: call every pixel tumour whose FLAIR value is at least t.

    Returns the one t that is best for these very slices, and the mean over patients of their 3-D Dice with it. The
    choice looks at the answers, so that no honest threshold does better. With a ``normalization``, t is in its units.
    A patient without tumour counts 1 if nothing is called tumour, else 0.
    """
    flair, tumour = slices.images[..., 1], slices.masks[..., 0].astype(bool)
    patient, count = slices.patient_indices(), len(slices.patient_names())
    values = np.tile(np.arange(256.0), (count, 1))  # (P, 256): what a grey value means in each patient
    if normalization is not None:
        low, high, mean, std = (row[:, 1:2] for row in normalization.statistics(slices))
        values = (np.clip(values, low, high) - mean) / std
    thresholds = np.linspace(values.min(), values.max(), 512)
    dice = np.zeros((count, len(thresholds)))
    for p in range(count):
        grey, inside = flair[patient == p], tumour[patient == p]
        # 256 counts tell all: how many pixels, and how many of the tumour's, each threshold lets through.
        passes = values[p][:, None] >= thresholds
        called = np.bincount(grey.ravel(), minlength=256) @ passes
        hit = np.bincount(grey[inside], minlength=256) @ passes
        total = called + inside.sum()
        dice[p] = np.where(total == 0, 1.0, 2 * hit / np.maximum(total, 1))
    best = dice.mean(axis=0).argmax()
    return float(thresholds[best]), float(dice.mean(axis=0)[best])


# ------------------------------------------------------------------------------------------ one patient


def make_patient(seed: int, patient: int, size: int = 128, *, tissues: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """One patient, S = 15 ... 25 slices from neck to crown: images uint8 (S, size, size, 3), masks (S, size, size, 1).

    The masks are those of :func:`make`.

    Raises ValueError if ``size`` is below 16.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16, got {size}")
    rng = generator(Key(seed=seed, stream=PHANTOM, image=patient))
    points = _head_coordinates(rng, size)
    image = np.full((3, *points[0].shape), AIR[0], np.float32)  # one plane a sequence, while it is painted

    surface = _head_surface(rng, points)
    _paint_scalp_and_face(rng, image, points, surface)
    cerebrum = _paint_cerebrum(rng, image, points, surface)
    _paint_cerebellum(rng, image, points, surface)
    ventricles = _paint_ventricles(rng, image, points, cerebrum)
    _paint_vessels(image, points, surface)
    tumour = _paint_tumour(rng, image, points, cerebrum, ventricles)
    # As they are painted: what comes later lies over what was there before.
    layers = (surface <= 1, cerebrum >= 0.5, tumour >= 0.5) if tissues else (tumour >= 0.5,)
    mask = np.zeros(tumour.shape, np.uint8)
    for number, layer in enumerate(layers, start=1):
        mask[layer] = number
    return _scan(rng, image), mask[..., None]


def _head_coordinates(rng: np.random.Generator, size: int) -> Points:
    """Where in the head each pixel is: patients lie a little differently, and fill the picture differently."""
    count = rng.integers(15, 26)
    angle, shift_y, shift_x = rng.uniform(-0.14, 0.14), rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04)
    height = rng.uniform(0.74, 0.95)  # of the head, as a share of the picture's
    z = np.linspace(rng.uniform(-0.75, -0.6), rng.uniform(0.92, 0.99), count, dtype=np.float32)
    pixel = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)
    z, row, column = np.meshgrid(z, (pixel - shift_y) / height, (pixel - shift_x) / height, indexing="ij")
    y = math.cos(angle) * row - math.sin(angle) * column
    x = math.sin(angle) * row + math.cos(angle) * column
    return z, y, x + 0.02 * rng.uniform(-1, 1) * z


def _head_surface(rng: np.random.Generator, points: Points) -> Field:
    """0 at the middle of the head, 1 at the skin: an egg, narrower in front, with a dome above and a nose below."""
    z, y, x = points
    width = rng.uniform(0.74, 0.82) * (1 + 0.10 * y)
    dome = np.maximum(z, 0) ** 2.6 + (0.35 * np.minimum(z, 0)) ** 2
    egg = np.sqrt(np.abs(x / width) ** 2.2 + np.abs(y / 0.95) ** 2.2 + dome)
    nose = _capsule(points, (-0.8, -0.93, 0.0), (-0.35, -0.82, 0.0)) / 0.12
    return np.minimum(egg * (1 + 0.025 * _smooth_noise(rng, z.shape, 3)), 0.85 + 0.15 * nose)


def _paint_scalp_and_face(rng: np.random.Generator, image: np.ndarray, points: Points, surface: Field) -> None:
    """Fat under the skin; a face and a base of the skull; above them the vault of the skull, as yet empty."""
    z, y, x = points
    scalp = rng.uniform(0.05, 0.08)
    _paint(image, _inside(1 - surface), FAT)
    head = _inside(1 - scalp - surface)
    # The face is a muddle of muscle, fat, bone and air: levels of a random field.
    texture = 0.7 * _smooth_noise(rng, z.shape, 12) + 0.7 * _smooth_noise(rng, z.shape, 26)
    _paint(image, head, BONE)
    _paint(image, head * _inside(texture + 0.5, 0.15), MUSCLE)
    _paint(image, head * _inside(texture - 0.8, 0.15), FAT)
    _paint(image, head * _inside(-1.0 - texture, 0.15), AIR)
    throat = np.hypot(x, 0.35 * (y + 0.55))
    _paint(image, head * _inside(0.11 - throat) * _inside(-0.25 - z), AIR)
    for side in (-1, 1):
        centre = (-0.3, -0.70, 0.31 * side)
        socket = _capsule(points, centre, (-0.3, -0.45, 0.16 * side))
        eye = _capsule(points, centre, centre)
        _paint(image, head * _inside(0.155 - socket), FAT)
        _paint(image, head * _inside(0.025 - socket), MUSCLE)  # optic nerve
        _paint(image, head * _inside(0.135 - eye), MUSCLE)
        _paint(image, head * _inside(0.12 - eye), FLUID)
    # Two dark plates of bone with marrow between them.
    vault = head * _inside(z + 0.25 + 0.15 * y, 0.05)
    _paint(image, vault, BONE)
    _paint(image, vault * _inside(0.01 - np.abs(surface - 0.91)) * rng.uniform(0.2, 1), MARROW)


def _paint_cerebrum(rng: np.random.Generator, image: np.ndarray, points: Points, surface: Field) -> Field:
    """White matter under a folded cortex, the deep nuclei, the cleft between the hemispheres; fluid around them.

    Returns the weight of the cerebrum.
    """
    z, y, x = points
    # Its floor: high at the forehead, low at the temples; under its back lies the cerebellum.
    temples = np.exp(-(((np.abs(x) - 0.42) / 0.2) ** 2) - ((y + 0.05) / 0.28) ** 2)
    above_floor = z + 0.12 + 0.30 * temples + 0.05 * _inside(y - 0.1, 0.1)
    below_skull = 0.87 + 0.01 * _smooth_noise(rng, z.shape, 4) - surface
    _paint(image, _inside(below_skull + 0.015) * _inside(above_floor + 0.05), FLUID)
    depth = np.minimum(below_skull, above_floor)
    cerebrum = _inside(depth)
    _paint(image, cerebrum, WHITE)

    # Grey matter lies under the surface and around the furrows. The furrows are where a smooth random field
    # crosses zero: winding sheets, about as far apart as the field's bumps are wide. They end at some depth.
    folds = np.abs(_smooth_noise(rng, z.shape, 20)) + 7.5 * np.maximum(depth - 0.13, 0)
    gaping = rng.uniform(0.6, 1.6)  # wide in some, narrow in others
    _paint(image, cerebrum * np.maximum(_inside(0.045 - depth), _inside(0.55 - folds, 0.08)), GREY)
    _paint(image, cerebrum * _inside(0.11 * gaping - folds, 0.05), FLUID)
    for side in (-1, 1):
        for centre, radii in (
            ((0.03, 0.04, 0.12 * side), (0.13, 0.13, 0.085)),  # thalamus
            ((0.05, -0.12, 0.27 * side), (0.13, 0.17, 0.06)),  # putamen
            ((0.12, -0.24, 0.14 * side), (0.10, 0.09, 0.05)),  # head of the caudate nucleus
        ):
            _paint(image, 0.8 * _inside(1 - _ellipsoid(points, centre, radii), 0.1), GREY)

    # The hemispheres are parted in front, at the back and on top.
    cleft = cerebrum * _inside(np.maximum(np.abs(y) - 0.42, z - 0.33), 0.03)
    aside = np.abs(x + 0.012 * _smooth_noise(rng, z.shape, 4))
    _paint(image, cleft * _inside(0.045 - aside), GREY)
    _paint(image, cleft * _inside(0.007 * (1 + gaping) - aside, 0.006), FLUID)
    return cerebrum


def _paint_cerebellum(rng: np.random.Generator, image: np.ndarray, points: Points, surface: Field) -> None:
    """Cerebellum and brain stem, under the back of the cerebrum, in fluid."""
    z, y, _ = points
    stem = _ellipsoid(points, (-0.50, 0.10, 0.0), (0.60, 0.13, 0.14))
    cerebellum = _ellipsoid(points, (-0.40, 0.45, 0.0), (0.26, 0.30, 0.46))
    level = np.maximum(np.minimum(stem, cerebellum), surface / 0.88) + 2 * np.maximum(z + 0.19, 0)
    _paint(image, _inside(1.07 - level, 0.03), FLUID)
    _paint(image, _inside(1 - level, 0.03), WHITE)
    leaves = _inside(_smooth_noise(rng, z.shape, 24), 0.15)
    _paint(image, _inside(1 - level, 0.03) * leaves * _inside(y - 0.15), GREY)


def _paint_ventricles(rng: np.random.Generator, image: np.ndarray, points: Points, cerebrum: Field) -> Field:
    """The chambers of fluid in the middle, and what is bright in FLAIR without being tumour: caps and spots.

    Returns the distance from the ventricles, negative inside.
    """
    _, y, _ = points
    wide = rng.uniform(0.7, 1.5)
    parts = [_capsule(points, (0.0, -0.12, 0.0), (0.0, 0.1, 0.0), squeeze_z=0.25) - 0.018 * wide]  # the third
    for side in (-1, 1):
        for start, end, radius in (
            ((0.14, -0.06, 0.05 * side), (0.10, -0.33, 0.14 * side), 0.042),  # front horn
            ((0.20, -0.06, 0.06 * side), (0.22, 0.20, 0.10 * side), 0.045),  # body
            ((0.20, 0.20, 0.11 * side), (0.05, 0.42, 0.21 * side), 0.048),  # back horn
            ((0.05, 0.28, 0.22 * side), (-0.20, 0.00, 0.34 * side), 0.022),  # lower horn
        ):
            parts.append(_capsule(points, start, end, squeeze_z=0.6) - radius * wide * rng.uniform(0.85, 1.15))
    distance = np.minimum.reduce(parts) + 0.008 * _smooth_noise(rng, y.shape, 10)

    # Caps sit on the horns, front and back.
    horns = np.exp(-(((np.abs(y) - 0.34) / 0.16) ** 2)) * np.exp(-((np.maximum(distance, 0) / 0.045) ** 2))
    _paint(image, cerebrum * horns * rng.uniform(0.1, 1.0), GLIOSIS)
    for _ in range(rng.integers(0, 8)):
        centre = (rng.uniform(0.0, 0.5), rng.uniform(-0.4, 0.45), rng.choice((-1, 1)) * rng.uniform(0.15, 0.45))
        radii = (0.07, rng.uniform(0.02, 0.055), rng.uniform(0.02, 0.055))
        _paint(image, cerebrum * _inside(1 - _ellipsoid(points, centre, radii), 0.2), GLIOSIS)

    _paint(image, cerebrum * _inside(-distance), FLUID)
    plexus = _inside(0.012 - np.abs(distance + 0.006)) * _inside(0.09 - np.abs(y - 0.21))
    _paint(image, cerebrum * plexus, BLOOD)
    return distance


def _paint_vessels(image: np.ndarray, points: Points, surface: Field) -> None:
    """The vein along the midline under the vault, and three arteries at the base: they take up the contrast agent."""
    z, y, x = points
    _paint(image, _inside(0.025 - np.abs(x)) * _inside(0.03 - np.abs(surface - 0.88)) * _inside(z + 0.1), BLOOD)
    for y_artery, x_artery in ((-0.28, 0.0), (-0.15, 0.16), (-0.15, -0.16)):
        across = np.hypot(y - y_artery, x - x_artery)
        _paint(image, _inside(0.03 - across) * _inside(0.08 - np.abs(z + 0.2)), BLOOD)


def _paint_tumour(
    rng: np.random.Generator, image: np.ndarray, points: Points, cerebrum: Field, ventricles: Field
) -> Field:
    """One tumour: merged balls made ragged by noise, inside the cerebrum. Returns its weight."""
    shape = points[0].shape
    centre = (rng.uniform(0.0, 0.5), rng.uniform(-0.42, 0.45), rng.choice((-1, 1)) * rng.uniform(0.24, 0.46))
    radius = rng.uniform(0.19, 0.34)
    level = np.full(shape, -np.inf, np.float32)  # 1 in the middle of a ball, 0 at the edge, negative outside
    for _ in range(rng.integers(2, 5)):
        ball = [c + rng.normal(0, 0.35 * radius) for c in centre]
        part = radius * rng.uniform(0.6, 1.0)
        radii = (1.25 * part, part * rng.uniform(0.75, 1.3), part * rng.uniform(0.75, 1.3))
        level = np.maximum(level, 1 - _ellipsoid(points, ball, radii))
    level += 0.20 * _smooth_noise(rng, shape, 8) + 0.14 * _smooth_noise(rng, shape, 18)
    tumour = cerebrum * _inside(level, 0.07) * _inside(ventricles)

    # Most are bright in FLAIR. Some are faint: hardly brighter than grey matter, given away by their darkness before
    # contrast and by the folds that are lost. Some have a dark core in a bright rim.
    kind = rng.choice(("bright", "faint", "hollow"), p=(0.60, 0.22, 0.18))
    darkest, brightest = {"bright": (0.64, 0.95), "faint": (0.47, 0.55), "hollow": (0.55, 0.75)}[str(kind)]
    before, flair = rng.uniform(0.20, 0.30), rng.uniform(darkest, brightest)
    _paint(image, tumour, (before, flair, before + 0.02))
    image *= 1 + 0.10 * tumour * _smooth_noise(rng, shape, 20)
    if kind == "hollow":
        core = _inside(level - rng.uniform(0.25, 0.45), 0.06)
        _paint(image, tumour * core, (0.18, rng.uniform(0.18, 0.30), 0.19))
    if rng.random() < 0.4:  # a ring takes up the contrast agent, here and there
        ring = np.exp(-(((level - 0.3) / 0.10) ** 2)) * _inside(_smooth_noise(rng, shape, 9), 0.2)
        _paint(image, tumour * ring, (before, flair, rng.uniform(0.6, 0.9)))
    return tumour


def _scan(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """What the scanner makes of the tissues: each sequence with its own gain, contrast, coil and noise.

    (3, S, H, W) in, uint8 (S, H, W, 3) out.
    """
    shape = image.shape[1:]
    signals, noises = [], []
    for sequence in image:
        coil = np.exp(rng.uniform(0.05, 0.2) * _smooth_noise(rng, shape, 2))  # sees some places better than others
        gain, contrast = rng.uniform(95, 185), rng.uniform(0.85, 1.2)
        signals.append(gain * coil * sequence**contrast)
        noises.append(gain * rng.uniform(0.008, 0.025))
    stand_in = rng.random() < 0.08
    # Noise last, so that all else is the same at every size. It sits on both parts of a complex signal, of which the
    # scanner shows the magnitude: it is never negative (Rician).
    for channel, (signal, noise) in enumerate(zip(signals, noises, strict=True)):
        real, imaginary = rng.standard_normal((2, *shape), dtype=np.float32)
        signals[channel] = np.hypot(signal + noise * real, noise * imaginary)
    if stand_in:  # as in some real patients, one sequence was not taken, and FLAIR stands in its place
        signals[2] = signals[1]
    return np.clip(np.rint(np.stack(signals, axis=-1)), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------ brushes


def _paint(image: np.ndarray, weight: Field, values: Sequence[float]) -> None:
    """Lays grey ``values``, one a sequence, over the image, in place: opaque where the weight is 1, clear where 0."""
    for sequence, value in zip(image, values, strict=True):
        sequence += weight * (np.float32(value) - sequence)


def _inside(distance: Field, softness: float = 0.012) -> Field:
    """1 where ``distance`` is positive, 0 where it is negative, with a soft edge: a tissue ends within a pixel."""
    return 0.5 + 0.5 * np.tanh(distance / (2 * softness))


def _ellipsoid(points: Points, centre: Sequence[float], radii: Sequence[float]) -> Field:
    """Distance from ``centre`` (z, y, x) in units of the radii: 1 on the surface of the ellipsoid."""
    total = np.float32(0)
    for p, c, r in zip(points, centre, radii, strict=True):
        total = total + ((p - float(c)) / float(r)) ** 2
    return np.sqrt(total)


def _capsule(points: Points, start: Sequence[float], end: Sequence[float], squeeze_z: float = 1.0) -> Field:
    """Distance from the line between two points (z, y, x). With ``squeeze_z`` below 1 distances along z count less."""
    scale = (squeeze_z, 1.0, 1.0)
    line = [s * float(b - a) for a, b, s in zip(start, end, scale, strict=True)]
    offset = [s * (p - float(a)) for p, a, s in zip(points, start, scale, strict=True)]
    length2 = max(sum(c * c for c in line), 1e-12)  # a line of length 0 is a point
    # How far along the line the nearest point lies: 0 at its start, 1 at its end.
    along = np.clip((offset[0] * line[0] + offset[1] * line[1] + offset[2] * line[2]) / length2, 0, 1)
    return np.sqrt(
        (offset[0] - along * line[0]) ** 2 + (offset[1] - along * line[1]) ** 2 + (offset[2] - along * line[2]) ** 2
    )


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> Field:
    """A smooth random field with variance about 1 whose bumps are about 1 / ``cells`` of the picture wide.

    White noise on a coarse grid, blended by cubic B-splines along each axis.
    """
    grid = rng.standard_normal((cells + 3, cells + 3, cells + 3), dtype=np.float32)
    for axis, length in enumerate(shape):
        grid = np.moveaxis(np.tensordot(_spline_weights(length, cells), grid, axes=(1, axis)), 0, axis)
    return grid / np.float32(0.33)


def _spline_weights(length: int, cells: int) -> np.ndarray:
    """(length, cells + 3): row i blends the four grid points around place i with the weights of a cubic B-spline."""
    place = (np.arange(length) + 0.5) * cells / length
    distance = np.abs(place[:, None] + 1 - np.arange(cells + 3))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.maximum(2 - distance, 0) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)
