"""Lab shifted: the odd pixel of padding stands on the wrong side."""

import numpy as np

from minunet.exercises.exercise import Exercise, Mistakes, likely_cause, require_array, require_equal
from minunet.exercises.learner import Learner
from minunet.ops import conv2d_forward
from minunet.ops.conv2d import output_size


def check(learner: Learner) -> list[str]:
    """Raise NotYet unless padding and convolution are what Keras calls "same"."""
    sizes = ((12, 3, 2), (9, 3, 1), (7, 2, 1), (5, 4, 1), (6, 3, 3), (8, 2, 2), (4, 1, 2), (9, 5, 4))
    found, expected = [], []
    for size, kernel, stride in sizes:
        pad = np.array(learner.call_for("before, after", "same_padding", size, kernel, stride))
        require_array(f"same_padding(size={size}, kernel={kernel}, stride={stride})", pad, (2,), np.int64)
        found.append(pad)
        expected.append(output_size(size, kernel, stride, "same")[1])
    cause = likely_cause(np.array(found), np.array(expected), _mistakes(np.array(expected), sizes), {})
    for (size, kernel, stride), pad, right in zip(sizes, found, expected, strict=True):
        what = f"same_padding(size={size}, kernel={kernel}, stride={stride}): zeros (before, after)"
        require_equal(what, pad, np.array(right), cause=cause)
    rng = np.random.default_rng(0)
    for shape, kernel_shape, stride in (((12, 12), (3, 3), 2), ((7, 6), (2, 3), 1), ((5, 8), (3, 2), 2)):
        x, weight = rng.standard_normal(shape), rng.standard_normal(kernel_shape)
        y = conv2d_forward(x[None, :, :, None], weight[:, :, None, None], None, stride, "same")[0][0, :, :, 0]
        turned = conv2d_forward(x[None, :, :, None], weight[::-1, ::-1, None, None], None, stride, "same")[0][
            0, :, :, 0
        ]
        require_equal(
            f"convolve of {shape} with {kernel_shape}, stride {stride}",
            learner.call("convolve", x, weight, stride),
            y,
            {"the kernel is turned by 180 degrees: convolve was right, put it back": turned},
        )
    return [
        "that was the cause: the odd zero stood before the pixels, so that each window began one pixel too early",
        "same_padding and convolve are those of Keras, for odd and even sizes, kernels and strides",
    ]


def _mistakes(pads: np.ndarray, sizes: tuple[tuple[int, int, int], ...]) -> Mistakes:
    """Wrong (before, after) for all sizes at once: one size alone would not tell them apart."""
    total = pads.sum(axis=1, keepdims=True)
    nothing = np.zeros_like(total)
    half_kernels = np.array([[kernel // 2] * 2 for _, kernel, _ in sizes])
    return {
        "the odd zero stands before the pixels: Keras puts it after them": pads[:, ::-1],
        "all of the padding stands before the pixels": np.hstack([total, nothing]),
        "all of the padding stands after the pixels": np.hstack([nothing, total]),
        "kernel // 2 on both sides: too much for an even kernel or a stride": half_kernels,
        "the smaller half on both sides: an odd zero is lost": np.hstack([total // 2, total // 2]),
        "the larger half on both sides: one zero too many": np.hstack([total - total // 2, total - total // 2]),
        "no padding": np.zeros_like(pads),
    }


EXERCISE = Exercise(
    name="shifted",
    title="every outline lies one pixel off",
    functions=("same_padding", "convolve"),
    hints=(
        "What is between the right weights and the right result, that Keras and this file might do differently, and "
        "that "
        "moves everything by a pixel?",
        "With 12 pixels, a kernel of 3 and stride 2, a single zero is needed. On which side does it stand here? And "
        "in Keras "
        "(docs/derivations/conv2d.md, What goes wrong)?",
        "Keras puts the odd zero after the pixels. So `before` is total // 2, and `after` the rest.",
    ),
    check=check,
)
