"""Grey values to network inputs. A normalisation is kept with the model: predicting must do what training did.

The grey values of an MR image have no unit. A scanner, a coil, a sequence give each volume a range of its
own, so that 120 is tumour in one patient and healthy tissue in the next. ``kind="volume"`` therefore looks at
the whole volume of a patient, each channel on its own: values outside the 10th to the 99th percentile are clipped (a
few very bright pixels no longer set the scale), then the mean is subtracted and the result divided by the standard
deviation. ``kind="scale"`` is the reference's plain x / 255, and ``kind="none"`` is for images that are network inputs
already: it changes nothing.

All are one formula, ``(clip(x, low, high) - mean) / std``, with four numbers a channel. They are found once a
patient, on the CPU (``Normalization.statistics``), and used on whichever device the batch is (``apply``).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from minunet.base.backend import Array, array_module
from minunet.base.choices import check_choice
from minunet.data.slices import IMAGE_DTYPES, SliceSet

NormalizationKind = Literal["scale", "volume", "none"]


class VolumeStatistics(NamedTuple):
    """What ``apply`` needs to know of P volumes: four float64 arrays (P, C)."""

    low: np.ndarray  # values below are clipped to it
    high: np.ndarray  # values above are clipped to it
    mean: np.ndarray  # of the clipped values
    std: np.ndarray  # of the clipped values; 1 where they are all equal, so that they become 0 and not NaN

    def take(self, volumes: np.ndarray) -> "VolumeStatistics":
        """The rows ``volumes``: with ``slices.patient_indices()[batch]``, the statistics of a batch's images."""
        return VolumeStatistics(*(values[volumes] for values in self))


@dataclass(frozen=True)
class Normalization:
    """How grey values become network inputs.

    kind         "volume" (clip and z-score, by volume and channel), "scale" (x / 255, of 16 bits x / 65535; of float
                 images nobody knows the largest value) or "none" (x as it is)
    percentiles  of all pixels of the volume's channel, between which "volume" clips; in [0, 100], ascending

    Raises ValueError for any other kind or percentiles.

    >>> Normalization.from_dict(Normalization("scale").to_dict())
    Normalization(kind='scale', percentiles=(10.0, 99.0))
    """

    kind: NormalizationKind = "volume"
    percentiles: tuple[float, float] = (10.0, 99.0)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, NormalizationKind)
        if len(self.percentiles) != 2 or not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles must be two ascending numbers in [0, 100], got {self.percentiles!r}")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON; ``from_dict`` is its inverse."""
        return {"kind": self.kind, "percentiles": list(self.percentiles)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Normalization":
        """The normalisation that ``to_dict`` wrote. Raises ValueError for anything else."""
        if not isinstance(values, dict) or set(values) != {"kind", "percentiles"}:
            raise ValueError(f"a normalisation must have kind and percentiles, got {values!r}")
        try:
            low, high = values["percentiles"]
            if not {type(low), type(high)} <= {int, float}:
                raise TypeError
        except (TypeError, ValueError):
            raise ValueError(
                f"percentiles must be two ascending numbers in [0, 100], got {values['percentiles']!r}"
            ) from None
        return cls(kind=values["kind"], percentiles=(low, high))

    def statistics(self, slices: SliceSet) -> VolumeStatistics:
        """One row a patient, in the order of ``slices.patient_names()``."""
        patient = slices.patient_indices()
        volumes = [
            self.volume_statistics(slices.images[i][slices.extent(i)] for i in np.flatnonzero(patient == p).tolist())
            for p in range(len(slices.patient_names()))
        ]
        return VolumeStatistics(*(np.concatenate(rows) for rows in zip(*volumes, strict=True)))

    def volume_statistics(self, images: Iterable[np.ndarray]) -> VolumeStatistics:
        """The statistics of ``images``, uint8, uint16 or float32 (H, W, C) each, taken as one volume: one row.

        Each is looked at once, so that they need not be in memory together; those of float32 are. This is also the way
        to predict loose images: those that are predicted together count as one volume.

        Raises ValueError if there is no pixel, if the dtype or C is another or not that of all, and if they are float32
        and the kind is "scale".
        """
        dtype, channels = _counted(images)
        row = np.ones((1, len(channels)))
        if self.kind == "volume":
            moments = np.array([_clipped_moments(of_channel, self.percentiles) for of_channel in channels])
            return VolumeStatistics(*moments.T[:, None, :])
        if self.kind == "none":
            largest = float(np.finfo(np.float32).max)
            return VolumeStatistics(low=-largest * row, high=largest * row, mean=0 * row, std=row)
        if dtype == np.float32:
            raise ValueError(
                "images must be uint8 or uint16 for the kind 'scale', got float32; take 'volume' or 'none'"
            )
        largest = np.iinfo(dtype).max
        return VolumeStatistics(low=0 * row, high=largest * row, mean=0 * row, std=largest * row)


class _Counted(NamedTuple):
    """The pixels of a channel, regardless of their order."""

    values: np.ndarray  # ascending
    counts: np.ndarray  # how often each occurs


def _counted(images: Iterable[np.ndarray]) -> tuple[np.dtype, list[_Counted]]:
    """The dtype of the images of a volume, and the pixels of each of its channels. Raises ValueError as above."""
    kind: tuple[np.dtype, int] | None = None  # dtype and C of all
    histograms: list[np.ndarray] = []  # one a channel: integers are counted as they come
    floats: list[np.ndarray] = []
    for image in images:
        if image.ndim != 3 or image.size == 0 or image.dtype not in IMAGE_DTYPES:
            expected = "uint8, uint16 or float32 (H, W, C), none 0"
            raise ValueError(f"images must be {expected}, got {image.dtype} {image.shape}")
        kind = kind or (image.dtype, image.shape[2])
        if kind != (image.dtype, image.shape[2]):
            raise ValueError(f"images must be of one dtype and one C, got {image.dtype} and C = {image.shape[2]}, too")
        if image.dtype == np.float32:
            floats.append(image)
            continue
        grey_values = np.iinfo(image.dtype).max + 1
        histograms = histograms or [np.zeros(grey_values, np.int64) for _ in range(image.shape[2])]
        for channel, histogram in enumerate(histograms):
            histogram += _histogram(image[..., channel], grey_values)
    if kind is None:
        raise ValueError("images must be at least one, got none")
    if histograms:
        return kind[0], [_Counted(np.arange(len(histogram)), histogram) for histogram in histograms]
    channels = []
    for channel in range(kind[1]):
        values, counts = np.unique(
            np.concatenate([image[..., channel].ravel() for image in floats]), return_counts=True
        )
        channels.append(_Counted(values.astype(np.float64), counts))
    return kind[0], channels


def _histogram(pixels: np.ndarray, values: int) -> np.ndarray:
    """How often each grey value occurs: in bands of rows, so that the copy that bincount makes stays small."""
    rows = max(1, 2**20 // pixels.shape[1])
    bands = (pixels[start : start + rows] for start in range(0, len(pixels), rows))
    return sum(np.bincount(band.ravel(), minlength=values) for band in bands)  # type: ignore[return-value]


def _clipped_moments(channel: _Counted, percentiles: tuple[float, float]) -> tuple[float, float, float, float]:
    """low, high, mean, std from the counted values: they say all that the pixels say, and exactly."""
    values, counts = channel
    low, high = (_percentile(values, counts, q) for q in percentiles)
    if low == high:
        return low, high, low, 1.0
    values = np.clip(values, low, high)
    mean = counts @ values / counts.sum()
    variance = counts @ (values - mean) ** 2 / counts.sum()
    return low, high, mean, np.sqrt(variance)


def _percentile(values: np.ndarray, counts: np.ndarray, q: float) -> float:
    """The q-th percentile of the counted values, linear between two neighbours: np.percentile's definition."""
    position = q / 100 * (counts.sum() - 1)
    below = int(position)
    # The value at place k of the sorted pixels is the first whose cumulative count exceeds k.
    places = np.searchsorted(np.cumsum(counts), [below, min(below + 1, counts.sum() - 1)], side="right")
    first, second = values[places]
    return float(first + (position - below) * (second - first))


def apply(images: Array, statistics: VolumeStatistics, dtype: Any = "float32") -> Array:
    """``(clip(x, low, high) - mean) / std`` as a new array of ``dtype``, on the device of ``images``.

    images      uint8, uint16 or float32 (N, H, W, C), NumPy or CuPy
    statistics  NumPy, one row an image (N, C) or one row for all (1, C): ``VolumeStatistics.take`` makes them

    Raises ValueError if the dtype or shapes do not fit.

    >>> volume = np.array([0, 100, 200], np.uint8).reshape(1, 1, 3, 1)
    >>> apply(volume, Normalization("volume", (0, 100)).volume_statistics(volume)).ravel()
    array([-1.2247449,  0.       ,  1.2247449], dtype=float32)
    """
    xp = array_module(images)
    if images.dtype not in IMAGE_DTYPES or images.ndim != 4:
        raise ValueError(f"images must be uint8, uint16 or float32 (N, H, W, C), got {images.dtype} {images.shape}")
    count, height, width, channels = images.shape
    if statistics.low.shape not in ((count, channels), (1, channels)):
        raise ValueError(
            f"statistics must have shape {(count, channels)} or {(1, channels)}, got {statistics.low.shape}"
        )
    # Each number repeated along a row of pixels: NumPy's innermost loop then runs over the row, and not over the few
    # channels of a pixel.
    low, high, mean, std = xp.asarray(np.tile(np.stack(statistics).astype(dtype), width)[:, :, None, :])
    rows = xp.clip(images.reshape(count, height, width * channels).astype(dtype), low, high)
    rows -= mean
    rows /= std
    return rows.reshape(images.shape)
