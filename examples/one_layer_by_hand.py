"""One convolution by hand: forward, backward, the check of its gradient, and a filter learned by gradient descent.

    python examples/one_layer_by_hand.py

The first thing to run, and to change: everything that a U-Net does is here once, with numbers small enough to follow.
"""

import numpy as np

from minunet.ops import conv2d_backward, conv2d_forward

np.set_printoptions(precision=3, suppress=True)
rng = np.random.default_rng(0)

# ---- 1. Forward: slide a 3 x 3 filter over an image --------------------------------------------------------------
# Arrays are (image, row, column, channel), weights are (row, column, channel in, channel out).
# The image is dark on the left and bright on the right; the filter takes right minus left.

image = np.array([[0.1, 0.1, 0.2, 0.9, 0.9]] * 4)
edge_filter = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=float)  # Sobel's

x = image.reshape(1, 4, 5, 1)
weight = edge_filter.reshape(3, 3, 1, 1)
bias = np.zeros(1)
y, cache = conv2d_forward(x, weight, bias, padding=0)

print("1. FORWARD")
print("the image", image, "the filter", edge_filter, sep="\n")
print("its answer, large where the edge is", y[0, :, :, 0], sep="\n")
# Each answer is the sum of a 3 x 3 window of the image times the filter.
print(f"top right by hand: {(image[0:3, 2:5] * edge_filter).sum():.3f}")

# ---- 2. Backward: from the slope at the output to the slopes at everything that made it -----------------------------
# Some loss L lies behind y. What we are told is dy = dL/dy: how much L grows with each number of y. What we
# want is the same for the image, the filter and the bias. The cache holds what forward has to tell backward.

dy = rng.normal(size=y.shape)
dx, dweight, dbias = conv2d_backward(dy, cache)

print("\n2. BACKWARD\ndy: the slope of L in each output", dy[0, :, :, 0], sep="\n")
print("dweight: the slope of L in each number of the filter", dweight[:, :, 0, 0], sep="\n")
print("dx: the slope of L in each pixel", dx[0, :, :, 0], sep="\n")
# A filter number meets one pixel for each output: multiply each dy by that pixel and add.
print(f"dweight at the top right by hand: {(dy[0, :, :, 0] * image[0:2, 2:5]).sum():.3f}")

# ---- 3. Is it right? Compare with a derivative that only ever runs the forward pass ---------------------------------
# L = sum(dy * y) has exactly dy as its slope in y. Change one number of the filter a little and see what L does.


def loss_of(weight):
    """L for this filter, everything else held fixed."""
    y, _ = conv2d_forward(x.astype(weight.dtype), weight, bias.astype(weight.dtype), padding=0)
    return (dy * y).sum()


finite_difference = np.empty_like(dweight)
complex_step = np.empty_like(dweight)
for index in np.ndindex(weight.shape):
    one = np.zeros_like(weight)
    one[index] = 1
    # (L(w + h) - L(w - h)) / 2h: h must be small, but the subtraction then loses digits.
    finite_difference[index] = (loss_of(weight + 1e-5 * one) - loss_of(weight - 1e-5 * one)) / 2e-5
    # L(w + ih) = L(w) + ih L'(w) + ...: nothing is subtracted, so h can be absurdly small and no digit is lost.
    complex_step[index] = loss_of(weight + 1e-20j * one).imag / 1e-20

print("\n3. CHECK: largest difference from dweight, over the largest of dweight")
for name, numeric in (("finite difference", finite_difference), ("complex step", complex_step)):
    print(f"   {name:17}  {np.abs(numeric - dweight).max() / np.abs(dweight).max():.1e}")

# ---- 4. Learn: start from a random filter and let the gradient find the edge filter ---------------------------------
# The examples: random images, and what Sobel's filter makes of them. The loss is the mean of (y - target)^2 / 2,
# so dL/dy is (y - target) / size, and each step walks a little down the slope.

images = rng.normal(size=(4, 12, 12, 1))
target, _ = conv2d_forward(images, weight, bias, padding=0)
learned, learned_bias = rng.normal(size=weight.shape), rng.normal(size=1)

print("\n4. LEARN")
for step in range(21):
    y, cache = conv2d_forward(images, learned, learned_bias, padding=0)
    if step % 4 == 0:
        print(f"   step {step:2}  loss {((y - target) ** 2).mean() / 2:.6f}")
    _, dweight, dbias = conv2d_backward((y - target) / y.size, cache)
    learned = learned - 0.5 * dweight
    learned_bias = learned_bias - 0.5 * dbias
print("the learned filter", learned[:, :, 0, 0].round(2) + 0.0, sep="\n")  # + 0.0 turns -0 into 0

# Try: the filter [[0, 0, 0], [0, 1, 0], [0, 0, 0]] in part 1. h = 1e-12 in the finite difference of part 3, and in the
# complex step. A step of 3 instead of 0.5 in part 4. One image instead of four, and its pixels all equal.
