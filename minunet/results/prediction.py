"""From a checkpoint and image files of any size to masks: what training did to its images, done to new ones.

A network has learned from images prepared in one way, and a prediction is only as good as it is prepared in the same
way. So the preparation is read from the checkpoint, never guessed:

1. A network that was trained on resized images gets resized ones: each is brought to the square that the network was
   trained on, by the very function that read the training data (``data.images.resize_image``). A network that was
   trained on crops sees each image at its own size, in tiles that fit into memory (``training.tiles``).
2. The grey values are normalised with the statistics of their volume. The images of one folder are taken to be one
   volume. An image alone is a volume of one slice, and its statistics differ from those of the patient's whole
   volume, most of all in a slice near the crown: give the whole folder where you can.
3. The probabilities of resized images are resized back to the image's own size, bilinearly, and compared with the
   threshold only there, so that the outline is smooth at any size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from minunet import engines
from minunet.base.archive import sha256_of_arrays
from minunet.base.backend import Device, to_device
from minunet.base.durable import write_durably
from minunet.base.errors import UserError
from minunet.data.images import MAX_PIXELS, RGB, Kind, fitted, read_image, resize_image, shown
from minunet.data.images import place as put
from minunet.data.normalize import Normalization, VolumeStatistics
from minunet.data.slices import LGG, SliceSet, Words, read_names
from minunet.engines import memory
from minunet.network.layers import map_arrays
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.training.checkpoint import Weights, load_net
from minunet.training.evaluation import predict_slices, predict_tiles
from minunet.training.step import Engine
from minunet.training.tiles import tiles

#: Images that are predicted at a time.
BATCH = 16


#: Where a part of a prediction (H, W, K) is, and its probabilities, float32 (h, w, k).
Tiles = Iterable[tuple[tuple[slice, ...], np.ndarray]]


class Prepared(NamedTuple):
    """What is known of the images of one volume once each has been read."""

    images: np.ndarray | None  # uint8 (S, size, size, C), resized; None if they are predicted at their own size
    statistics: VolumeStatistics
    digests: list[str]  # of each image as it was read, so that another one is noticed


@dataclass
class Predictor:
    """A trained network with the preparation of images that it was trained with. A ``with`` block closes its engine."""

    net: UNet
    normalization: Normalization
    image_size: int | None  # pixels: the side of the square that every image is resized to; None: it is not resized
    flip_average: bool  # predict each image and its mirror image, and average the two, as the run's test did
    engine: Engine | None = None  # the one that was built last; None: the plain path
    batch: int = BATCH  # images at a time
    kind: Kind = RGB  # of the images that it was trained on
    words: Words = LGG  # what its data set calls things
    volume_of: Literal["image", "group"] = "group"  # whose grey values are normalised together: as in the training
    classes: tuple[str, ...] = ()  # of which each pixel has one, the background first; none: independent masks
    keep_ratio: bool = True  # a resized image keeps the ratio of its sides, and the rest of the square is padding
    max_pixels: int = MAX_PIXELS  # of an image that is read
    #: Builds an engine for so many images of a size (height, width) at a time; None: there is none but the plain path.
    make_engine: Callable[[int, tuple[int, int]], Engine] | None = None
    window: tuple[int, int] | None = None  # the size that the engine was built for

    @classmethod
    def load(
        cls,
        checkpoint: str | PathLike,
        *,
        weights: Weights = "auto",
        device: Device = "cpu",
        engine: engines.EngineChoice = "plain",
        precision: engines.Precision = "float32",
        max_batch: int = BATCH,
        network: type[UNet] = UNet,
        max_pixels: int = MAX_PIXELS,
    ) -> "Predictor":
        """The predictor in a checkpoint of ``training.loop.fit``.

        ``weights`` and ``network`` as in ``checkpoint.load_net``; ``engine``, ``precision`` and ``max_batch`` (images
        at a time) as in ``minunet.engines.build``. Fewer images are taken at a time where memory is short, and none of
        more than ``max_pixels``.

        Raises UserError if the file is no checkpoint, does not say how images are prepared, or has an image size at
        which not even one image fits into memory.
        """
        net, metadata = load_net(checkpoint, weights, network=network)
        normalization, image_size, flip_average, keep_ratio = _preprocessing(checkpoint, metadata, 2**net.depth)
        net = map_arrays(net, lambda array: to_device(array.astype("float32"), device))
        side = image_size or memory.window_side(net)
        batch = min(max_batch if image_size else 1, BATCH, _batch_that_fits(checkpoint, net, (side, side)))

        def make_engine(images: int, size: tuple[int, int]) -> Engine:
            return engines.build(net, SegmentationLoss(), images, size, device, engine, precision, training=False)

        kind = _kind(metadata, net.config["in_channels"])
        words, classes = _names(checkpoint, metadata, net)
        predictor = cls(
            net,
            normalization,
            image_size,
            flip_average,
            batch=batch,
            kind=kind,
            words=words,
            volume_of="image" if metadata.get("volume") == "image" else "group",
            classes=classes,
            keep_ratio=keep_ratio,
            max_pixels=max_pixels,
            make_engine=make_engine,
        )
        if image_size is not None and (built := predictor._engine_for((image_size, image_size))) is not None:
            built.freeze()
        return predictor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.engine is not None:
            self.engine.close()

    def _engine_for(self, window: tuple[int, int]) -> Engine | None:
        """The engine for images of that size: the one there is, if it is for them."""
        if self.make_engine is not None and self.window != window:
            if self.engine is not None:
                self.engine.close()
            self.engine, self.window = self.make_engine(self.batch, window), window
        return self.engine

    def prepare(self, files: Sequence[Path]) -> Prepared:
        """What :meth:`volume` needs of the images of one volume: all that can be wrong with a file is found here.

        Raises UserError for a file that is no image, has other channels than the network, or is too large for the
        memory that is free.
        """
        size, classes = self.image_size, self.net.config["out_channels"]
        digests: list[str] = []

        def read() -> Iterator[np.ndarray]:  # and no list: a large volume is in memory once, and resized
            for file in files:
                image = read_image(file, self.kind, self.max_pixels)
                digests.append(_digest(image))
                height, width, _ = image.shape
                # The masks, a byte a class, and the probabilities of one class, resized and compared.
                needed = (classes + 8) * height * width
                _check_memory(f"{shown(file)}: {classes} x {width} x {height} pixels of prediction", needed)
                yield image

        if size is None:
            return Prepared(None, self.normalization.volume_statistics(read()), digests)
        images = np.empty((len(files), size, size, self.kind.channels), f"uint{self.kind.bits}")
        _check_memory(f"{shown(files[0].parent)}: {len(files)} images of {size} x {size} pixels", images.nbytes)

        def resized() -> Iterator[np.ndarray]:
            for place, image in enumerate(read()):
                rows, columns = self._fitted(image)
                put(images[place], resize_image(image, rows, columns))
                yield images[place, :rows, :columns]  # the padding is no part of the volume

        return Prepared(images, self.normalization.volume_statistics(resized()), digests)

    def volume(self, files: Sequence[Path], prepared: Prepared) -> Iterator[tuple[Path, np.ndarray, Tiles]]:
        """Each image of a volume: its file, the image as it is, and the probabilities at its size, part by part.

        ``prepared`` is what :meth:`prepare` has made of these files. Each is read once more.

        Raises UserError if a file does not hold the image any more that was prepared.
        """
        for place, (file, digest) in enumerate(zip(files, prepared.digests, strict=True)):
            image = read_image(file, self.kind, self.max_pixels)
            if _digest(image) != digest:
                raise UserError(f"{shown(file)}: changed while it was being predicted, predict it again")
            if prepared.images is None:
                yield file, image, self._tiles(image, prepared.statistics)
            else:
                if place % self.batch == 0:
                    found = self.probabilities(prepared.images[place : place + self.batch], prepared.statistics)
                rows, columns = self._fitted(image)
                yield file, image, _resized_classes(found[place % self.batch, :rows, :columns], *image.shape[:2])

    def _tiles(self, image: np.ndarray, statistics: VolumeStatistics) -> Tiles:
        side, (height, width, _) = memory.window_side(self.net), image.shape
        rows, columns = next(tiles(self.net, height, width, side))
        engine = self._engine_for((rows.stop, columns.stop))
        return predict_tiles(self.net, image, statistics, side, flip_average=self.flip_average, engine=engine)

    def _fitted(self, image: np.ndarray) -> tuple[int, int]:
        """Height and width of a resized image."""
        assert self.image_size is not None
        if self.keep_ratio:
            height, width, _ = image.shape
            return fitted(height, width, self.image_size)
        return self.image_size, self.image_size

    def probabilities(self, images: np.ndarray, statistics: VolumeStatistics | None = None) -> np.ndarray:
        """The probabilities, float32 (S, H, W, K), for ``images`` (S, H, W, C).

        They are one volume, or part of one with these ``statistics``.
        """
        return predict_slices(
            self.net,
            SliceSet.unlabelled(images),
            statistics or self.normalization,
            batch_size=self.batch,
            flip_average=self.flip_average,
            engine=self.engine,
        )


def _resized_classes(probabilities: np.ndarray, height: int, width: int) -> Tiles:
    """``probabilities`` (h, w, K) at the size of an image, one class at a time: all together may fill the memory."""
    for k in range(probabilities.shape[2]):
        place = slice(k, k + 1)
        yield (slice(None), slice(None), place), resize_probabilities(probabilities[..., place], height, width)


def _check_memory(what: str, needed: int) -> None:
    """Raise UserError if ``what`` needs more bytes than are free."""
    available = memory.host_bytes()
    if available is not None and needed > available:
        raise UserError(
            f"{what} take about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free, give fewer or smaller "
            "images or use a machine with more memory"
        )


def _digest(image: np.ndarray) -> str:
    return sha256_of_arrays({"image": image})


def _batch_that_fits(checkpoint: str | PathLike, net: UNet, size: tuple[int, int]) -> int:
    """How many images can be predicted at a time. Raises UserError if that is none."""
    available = memory.available_bytes(net)
    if available is None:
        return BATCH
    if (largest := memory.largest_batch(net, size, available, memory.prediction_bytes)) == 0:
        needed = memory.prediction_bytes(net, size, 1)
        raise UserError(
            f"{shown(checkpoint)}: its images are {size[1]} x {size[0]} pixels, and to predict one takes about "
            f"{needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free, use a machine with more memory"
        )
    return largest


def _kind(metadata: dict[str, Any], channels: int) -> Kind:
    """The kind of the images that a network was trained on: of 8 bits, unless its checkpoint says otherwise."""
    found = metadata.get("kind")
    return Kind(channels, 16 if isinstance(found, dict) and found.get("bits") == 16 else 8)


def _names(checkpoint: str | PathLike, metadata: dict[str, Any], net: UNet) -> tuple[Words, tuple[str, ...]]:
    """What the things of the data set are called, and the classes; numbered, if a network of classes has no names."""
    channels, exclusive = net.config["out_channels"], net.config["output"] == "softmax"
    try:
        words, classes = Words.read(metadata.get("words")), read_names(metadata.get("classes", ()))
        if exclusive and not classes:
            classes = ("background", *(f"class {number}" for number in range(1, channels)))
        if len(classes) != (channels if exclusive else 0):
            raise ValueError(f"{len(classes)} classes do not fit a network with {channels} channels of this kind")
        if words.targets and not exclusive and len(words.targets) != channels:
            raise ValueError(f"{len(words.targets)} names do not fit a network for {channels} masks")
    except ValueError as error:
        raise UserError(f"{shown(checkpoint)}: {error}, give a checkpoint that examples/train_lgg.py wrote") from None
    return words, classes


def _preprocessing(
    checkpoint: str | PathLike, metadata: dict[str, Any], multiple: int
) -> tuple[Normalization, int | None, bool, bool]:
    """Normalisation, image size (a ``multiple``, or None), flip average and whether the ratio of the sides is kept."""
    found = metadata.get("preprocessing")
    try:
        # An entry that this code does not know would be a step of the preparation that it leaves out.
        known = {"normalization", "image_size", "flip_average"}
        if not isinstance(found, dict) or set(found) - {"keep_ratio"} != known:
            raise ValueError("must have normalization, image_size and flip_average, and no more but keep_ratio")
        size = found["image_size"]
        if size is not None and (type(size) is not int or not 1 <= size <= 8192):
            raise ValueError(f"image_size must be a whole number from 1 to 8192, got {size!r}")
        if size is not None and size % multiple:
            raise ValueError(f"image_size must be a multiple of {multiple} for a network of this depth, got {size}")
        # Earlier versions squeezed every image into the square.
        flags = found["flip_average"], found.get("keep_ratio", False)
        for name, value in zip(("flip_average", "keep_ratio"), flags, strict=True):
            if type(value) is not bool:
                raise ValueError(f"{name} must be true or false, got {value!r}")
        return Normalization.from_dict(found["normalization"]), size, *flags
    except ValueError as error:
        raise UserError(
            f"{shown(checkpoint)}: does not say how to prepare images (preprocessing: {error}), "
            "give a checkpoint that examples/train_lgg.py wrote"
        ) from None


def resize_probabilities(probabilities: np.ndarray, height: int, width: int) -> np.ndarray:
    """``probabilities``, float32 (h, w, K), at ``height`` x ``width``: bilinear, and averaged where it shrinks.

    >>> resize_probabilities(np.array([[[0.0], [1.0]]], "float32"), 1, 4).ravel()
    array([0.  , 0.25, 0.75, 1.  ], dtype=float32)
    """
    from PIL import Image

    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        for channel in np.moveaxis(probabilities, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def write_png(path: str | PathLike, pixels: np.ndarray, *, overwrite: bool = True) -> None:
    """``pixels``, uint8 (H, W) or (H, W, 3), as a PNG at ``path``, by :func:`minunet.base.durable.write_durably`."""
    from PIL import Image

    write_durably(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"), overwrite=overwrite)
