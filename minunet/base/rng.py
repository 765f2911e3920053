"""Randomness as a function of a key: the same key draws the same numbers, in every process and on every engine.

A training step needs random numbers in many places: which slices, how they are turned, which activations
are dropped. A generator that is carried along would make each draw depend on every draw before it. Here
each draw names its place instead, with a :class:`Key`, and a counter-based generator, Philox 4x64-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), maps that name to its numbers. So a
resumed run draws what the unbroken run would have drawn, and half a batch draws what the whole would have.
"""

from typing import NamedTuple

import numpy as np

#: The streams of numbers that one seed feeds. Dropout layer ``k`` of a network uses ``DROPOUT + k``.
INITIALIZE, SAMPLE, AUGMENT, PHANTOM, BOOTSTRAP, NOISE, CROP, DROPOUT = 0, 1, 2, 3, 4, 5, 6, 16


class Key(NamedTuple):
    """The name of one draw.

    >>> Key(seed=0, epoch=3, step=17)
    Key(seed=0, epoch=3, step=17, stream=0, image=0)
    """

    seed: int
    epoch: int = 0
    step: int = 0  # steps done in the epoch
    stream: int = 0  # which use of the numbers: INITIALIZE, SAMPLE, ..., DROPOUT + layer
    image: int = 0  # place in the batch


def philox(key: Key) -> np.random.Philox:
    """Philox 4x64-10 at the start of the stream that ``key`` names.

    The key words are (seed, stream). Of the 256-bit counter, the lowest word counts the blocks drawn and
    the other three hold image, step and epoch, so that no two keys share a block.

    Raises ValueError if a field is negative or needs more than 64 bits.
    """
    for field, value in zip(Key._fields, key, strict=True):
        if not 0 <= value < 2**64:
            raise ValueError(f"key.{field} must be in [0, 2**64), got {value}")
    counter = np.array([0, key.image, key.step, key.epoch], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=np.array([key.seed, key.stream], dtype=np.uint64))


def generator(key: Key) -> np.random.Generator:
    """A NumPy generator at the start of the stream that ``key`` names.

    >>> [generator(Key(seed=0, epoch=epoch)).integers(100).item() for epoch in (1, 2, 1)]
    [72, 95, 72]
    """
    return np.random.Generator(philox(key))


def random_uint16(key: Key, size: int, first_block: int = 0) -> np.ndarray:
    """``size`` uniform 16-bit integers, the least significant quarter of each 64-bit word first.

    ``first_block`` skips so many blocks of 16 integers: the stream can be drawn in parts.

    >>> whole = random_uint16(Key(seed=0), 40)
    >>> (random_uint16(Key(seed=0), 8, first_block=2) == whole[32:]).all().item()
    True
    """
    words = philox(key).advance(first_block).random_raw(-(-size // 4)).astype("<u8", copy=False)
    return words.view("<u2")[:size]


def standard_normal(key: Key, size: int) -> np.ndarray:
    """``size`` numbers of the standard normal distribution, float32: two of each 64-bit word of the stream.

    The lower half of a word is a number u in (0, 1], the upper half an angle in [-pi, pi): with the radius
    sqrt(-2 log u), the two coordinates are independent and normal. (Box & Muller 1958, "A note on the generation of
    random normal deviates".) NumPy's own method, the ziggurat, throws some words away, so that the place of a number
    in the stream depends on all before it; here number e comes from word e // 2, and a GPU can draw each by itself.
    The last bits are those of the machine's log, cos and sin. Of 2**32 values of u the smallest gives the largest
    number there is, 6.8.

    >>> standard_normal(Key(seed=0), 3).round(3)
    array([2.585, 0.188, 0.053], dtype=float32)
    """
    words = philox(key).random_raw(-(-size // 2)).astype("<u8", copy=False)
    u = (words.view("<u4")[::2].astype("float32") + np.float32(0.5)) * np.float32(2**-32)
    angle = words.view("<i4")[1::2].astype("float32") * np.float32(np.pi / 2**31)
    radius = np.sqrt(-2 * np.log(u))
    pairs = np.empty((len(words), 2), dtype="float32")
    pairs[:, 0], pairs[:, 1] = radius * np.cos(angle), radius * np.sin(angle)
    return pairs.ravel()[:size]
