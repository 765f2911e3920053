"""From arrays to something that can be looked at: slices as pictures, and masks laid over them.

The colours are those of Okabe & Ito (2008, "Color Universal Design"), which people with any common kind of colour
vision tell apart.
"""

import numpy as np

from minunet.base.backend import Array, to_numpy
from minunet.data.slices import LGG, Words

BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
ORANGE, VERMILION, YELLOW, PURPLE = "#E69F00", "#D55E00", "#F0E442", "#CC79A7"

#: What a colour means, the same in every picture. In a difference a false negative is what only the actual mask
#: holds, a false positive what only the predicted one holds: each has the colour of its mask.
ACTUAL, PREDICTED, BOTH = SKY, VERMILION, YELLOW
TRAINING, VALIDATION = BLUE, VERMILION
#: Of several targets, each has its colour; from the ninth on they come again. On dark pictures the last is white, where
#: Okabe & Ito have black.
TARGETS = (SKY, VERMILION, YELLOW, GREEN, PURPLE, BLUE, ORANGE, "#FFFFFF")


def target_colors(count: int) -> list[str]:
    """The colours of so many targets.

    >>> len(set(target_colors(8))), target_colors(9)[8] == target_colors(9)[0]
    (8, True)
    """
    return [TARGETS[k % len(TARGETS)] for k in range(count)]


def display_image(images: Array, words: Words = LGG) -> np.ndarray:
    """``images`` (..., H, W, C) of any real dtype as pictures (..., H, W, 3), uint8.

    LGG-MRI holds pre-contrast, FLAIR and post-contrast in the three channels. FLAIR is shown, alone and in grey: it
    is the sequence on which the tumours were outlined, and on grey a coloured mask stands out. (As red, green
    and blue the three sequences would give a picture in colours that mean nothing.) Three channels without names,
    as ``words`` says, are red, green and blue. With any other number the first is shown in grey. Each picture is
    stretched from its 1st to its 99.5th percentile, so raw bytes and normalised floats look alike; a constant picture
    becomes black.

    >>> display_image(np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)).shape
    (1, 4, 4, 3)
    """
    images = to_numpy(images)
    if images.shape[-1] != 3 or words.channels:
        first = words.channels.index("FLAIR") if images.shape[-1] == len(words.channels) else 0
        images = images[..., first : first + 1]
    pictures = images.astype(np.float64)
    low, high = np.percentile(pictures, (1, 99.5), axis=(-3, -2, -1), keepdims=True)
    span = np.where(high > low, high - low, 1)
    pictures = (255 * np.clip((pictures - low) / span, 0, 1) + 0.5).astype(np.uint8)
    return np.repeat(pictures, 3 // pictures.shape[-1], axis=-1)


def outline(mask: Array) -> np.ndarray:
    """The pixels of ``mask`` (H, W) that have one of their four neighbours outside it: its inner border.

    >>> outline(np.ones((3, 3))).astype(int)
    array([[1, 1, 1],
           [1, 0, 1],
           [1, 1, 1]])
    """
    inside = np.pad(to_numpy(mask) > 0, 1)
    surrounded = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return inside[1:-1, 1:-1] & ~surrounded


def overlay(picture: np.ndarray, mask: Array, color: str = PREDICTED, opacity: float = 0.25) -> np.ndarray:
    """``picture`` (H, W, 3) uint8 with ``mask`` (H, W) laid over it: a tint of ``opacity``, and a solid outline."""
    rgb = _rgb(color)
    result = picture.astype(np.float64)
    inside = to_numpy(mask) > 0
    result[inside] = (1 - opacity) * result[inside] + opacity * rgb
    result[outline(mask)] = rgb
    return (result + 0.5).astype(np.uint8)


def overlay_targets(picture: np.ndarray, masks: Array, opacity: float = 0.25) -> np.ndarray:
    """``picture`` (H, W, 3) uint8 with each of ``masks`` (H, W, T) laid over it, in the colour of its target."""
    for k, color in enumerate(target_colors(masks.shape[2])):
        picture = overlay(picture, masks[..., k], color, opacity)
    return picture


def difference(picture: np.ndarray, target: Array, predicted: Array) -> np.ndarray:
    """``picture`` (H, W, 3) uint8, dimmed, with true positives, false positives and false negatives in colour."""
    target, predicted = to_numpy(target) > 0, to_numpy(predicted) > 0
    result = 0.55 * picture
    for where, color in (
        (target & predicted, BOTH),
        (~target & predicted, PREDICTED),
        (target & ~predicted, ACTUAL),
    ):
        result[where] = 0.2 * result[where] + 0.8 * _rgb(color)
    return (result + 0.5).astype(np.uint8)


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float64)
