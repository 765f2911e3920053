"""Are the kernels right on this GPU? A small convolution, all its passes, before the first step.

The kernels use instructions that the tests without a GPU only imitate, and GPUs come that nobody has tried them on. A
wrong gradient does not stop a training, it spoils it: so this is asked once a process, and takes a moment.
"""

from functools import partial

import numpy as np

from minunet.backend import Array, to_numpy
from minunet.engines.cuda.specification import SpecificationKernels

#: The largest difference from the specification, over the largest value: rounding, of products and of what is stored.
BOUNDS = {"float32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}


def distance(kernels: SpecificationKernels) -> float:
    """The largest difference of ``kernels`` from their specification, over the largest value expected; NaN for NaN.

    The specification runs on the CPU: on the GPU its products might be TF32, if the environment says so.
    """
    differences = []
    expected = _results(SpecificationKernels(np, kernels.precision))
    for found, wanted in zip(_results(kernels), expected, strict=True):
        differences.append(float(abs(found - wanted).max()) / float(abs(wanted).max()))
    return max(differences, key=lambda value: (np.isnan(value), value))


def _results(kernels: SpecificationKernels) -> list[np.ndarray]:
    """Forward with its statistics, grad-input and grad-weight, and a transposed convolution, of the same numbers."""
    xp, draw = kernels.xp, np.random.default_rng(0)
    numbers = partial(draw.standard_normal, dtype=np.float32)
    images, channels, others = (2, 9, 20), 40, 72

    def stored(shape: tuple[int, ...]) -> Array:
        array = xp.empty(shape, kernels.dtype)
        kernels.store(array, xp.asarray(numbers(shape)))
        return array

    x, dy = stored((*images, channels)), stored((*images, others))
    weight, up, bias = (xp.asarray(numbers(shape)) for shape in ((3, 3, channels, others), (2, 2, 72, 40), (40,)))
    y, dx, large = (
        xp.empty(shape, kernels.dtype) for shape in ((*images, others), (*images, channels), (2, 18, 40, 40))
    )
    mean, variance, dweight = xp.empty(others, "float32"), xp.empty(others, "float32"), xp.empty_like(weight)
    kernels.conv3x3(x, weight, y, mean, variance)
    kernels.conv3x3_grad_input(dy, weight, dx)
    kernels.conv3x3_grad_weight(x, dy, dweight)
    kernels.conv_transpose(dy, up, bias, large)
    return [to_numpy(array) for array in (kernels.load(y), variance, kernels.load(dx), dweight, kernels.load(large))]
