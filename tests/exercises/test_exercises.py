"""The exercises: solutions pass, starters and wrong solutions do not, and a wrong one is told what is wrong with it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minunet.exercises.__main__ import BACKWARD, LABS, STARTERS, find, main
from minunet.exercises.exercise import NotYet, likely_cause, require_equal
from minunet.exercises.learner import Learner

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = ROOT / "docs" / "exercises" / "solutions"
EXERCISES = (*BACKWARD, *LABS)


def mended(lab):
    """The starter of a lab with the change that docs/exercises/solutions/labs.md shows."""
    section = re.search(
        rf"^## {lab}\n\n```diff\n(.*?)```", (SOLUTIONS / "labs.md").read_text(), re.MULTILINE | re.DOTALL
    )
    lines = section[1].splitlines()
    old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
    return edited((STARTERS / f"{lab}.py").read_text(), old, new)


def solution(name):
    return mended(name) if name in LABS else (SOLUTIONS / f"{name}.py").read_text()


def edited(text, old, new):
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in it"
    return text.replace(old, new)


def check(name, text, folder):
    """What the checker found right; raises NotYet."""
    path = folder / f"{name}.py"
    path.write_text(text)
    exercise = find(name)
    return exercise.check(Learner(path, exercise.functions))


def refused(name, text, folder):
    with pytest.raises(NotYet) as caught:
        check(name, text, folder)
    return str(caught.value)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_right(name, tmp_path):
    assert check(name, solution(name), tmp_path)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_starter_is_not(name, tmp_path):
    message = refused(name, (STARTERS / f"{name}.py").read_text(), tmp_path)
    wanted = "not written yet" if name in BACKWARD else "likely cause"
    assert wanted in message


@pytest.mark.parametrize("name", EXERCISES)
def test_the_starter_says_how_to_go_on(name):
    text = (STARTERS / f"{name}.py").read_text()
    assert f"python -m minunet.exercises {name} FILE" in text
    for page, heading in re.findall(r'(docs/derivations/\w+\.md), (?:down to )?"([^"]+)"', text):
        assert f"## {heading}" in (ROOT / page).read_text()


@pytest.mark.parametrize("name", EXERCISES)
def test_three_hints(name):
    hints = find(name).hints
    assert len(set(hints)) == 3
    assert all(hint.strip() == hint and 40 < len(hint) < 400 for hint in hints)


@pytest.mark.parametrize("lab", LABS)
def test_a_lab_shows_a_symptom_which_mending_changes(lab, tmp_path):
    shown = []
    for text in ((STARTERS / f"{lab}.py").read_text(), mended(lab)):
        (tmp_path / "lab.py").write_text(text)
        command = [sys.executable, "-W", "error", "lab.py"]
        environment = {"PYTHONPATH": str(ROOT), "PATH": "", "MPLCONFIGDIR": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        shown.append(done.stdout)
    assert shown[0] != shown[1]
    if lab == "shifted":
        assert (
            re.findall(r"\[.*\]", shown[0])[0]
            == re.findall(r"\[.*\]", shown[1])[0]
            == re.findall(r"\[.*\]", shown[1])[1]
        )
    if lab == "astray":
        errors = [[float(error) for error in re.findall(r"error (\S+)", text)] for text in shown]
        assert errors[0][-1] > errors[0][0]
        assert errors[1] == sorted(errors[1], reverse=True)
    if lab == "smeared":
        assert (tmp_path / "smeared.png").stat().st_size > 10_000


# --- wrong solutions: what stands in the solution, what stands there instead, and what the learner is told ------------

RELU = "return np.where(cache.passed, dy, dy.dtype.type(0))"
POOL = "np.where(winner == u * size + v, dy, dy.dtype.type(0))"
DWEIGHT = 'dweight[u, v] = np.einsum("nijc,nijo->co", met, dy)'
DX = "+= dy @ weight[u, v].T"
NORM = "(dy - dbeta / m - cache.x_hat * dgamma / m) * cache.gamma * cache.inverse_std"
SKIP = "dfeatures = dskip + max_pool2d_backward(dpooled, cache.pool)"
DICE = "gradient = (dice - 2 * target) / (denominator * dice.size)"
STEP = "theta = theta - lr * m_hat / (np.sqrt(v_hat) + eps)"

WRONG = {
    "relu": [
        (RELU, "return dy.copy()", "dy goes back everywhere"),
        (RELU, "return cache.passed * 1.0", "the upstream gradient is ignored"),
        (RELU, "return np.where(cache.passed, 0.0, dy)", "the gate is inverted"),
        (RELU, "return np.where(cache.passed, dy, -dy)", "as for abs"),
        (RELU, "return np.maximum(dy, 0)", r"relu\(dy\)"),
        (RELU, "return np.maximum(dy, 0) * cache.passed", "only where it is positive as well"),
        (RELU, "return -dy * cache.passed", "the sign"),
        (RELU, "return dy * cache.passed / len(dy)", "1/2 of what it should be, and 2 is N, the number of images"),
        (RELU, "return dy * cache.passed / dy.size", r"1/48 .*the number of values"),
        (RELU, "return np.zeros_like(dy)", "all zeros"),
        (RELU, "return dy * cache.passed", "where dy is NaN(?s:.*)0 \\* NaN is NaN"),
        (RELU, "return np.where(cache.passed, dy, np.float64(0))", "expected +dtype float32(?s:.*)dtype"),
        (RELU, "return (dy * cache.passed).sum(axis=0)", "an axis is gone"),
        (RELU, "return np.where(cache.passed, dy, 0).swapaxes(1, 2)", "axes are exchanged"),
        (RELU, "return np.where(cache.passed, dy, 0).tolist()", "expected +an array of shape(?s:.*)list"),
        (RELU, "return (np.where(cache.passed, dy, 0),)", "expected +one array, dx"),
        (RELU, "np.where(cache.passed, dy, 0)", "no return statement"),
        (RELU, "dy *= cache.passed\n    return dy.copy()", "dy, the upstream gradient, as it was"),
        (RELU, "cache.passed[...] = True\n    return dy.copy()", "the cache as it was"),
        (RELU, "return dy", "memory shared with dy"),
        (RELU, "return dy @ cache.mask", "AttributeError(?s:.*)return dy @ cache.mask"),
        (RELU, "raise SystemExit(0)", r"SystemExit(?s:.*)raise SystemExit\(0\)"),
        (RELU, "return np.where(cache.passed, dy, np.nan)", "NaN or infinity"),
        (RELU, "return np.where(cache.passed, dy + 1e-9, 0)", "nearly right"),
    ],
    "max_pool2d": [
        (POOL, "dy", "dy goes to every pixel of the window"),
        (POOL, "dy / size**2", "as for average pooling"),
        (POOL, "winner == u * size + v", "the upstream gradient is ignored"),
        (POOL, "np.where(winner == v * size + u, dy, 0)", "rows and columns are exchanged"),
        (POOL, "np.where(winner != u * size + v, dy, 0)", "everyone but the winner"),
        (POOL, "dy if u == v == 0 else 0", "always the first pixel"),
        (POOL, "dy if u == v == size - 1 else 0", "always the last pixel"),
        (POOL, "np.where(winner == u * size + v + 1, dy, 0)", "off by one"),
        (POOL, "np.where(winner == size**2 - 1 - u * size - v, dy, 0)", "the wrong end"),
        (POOL, "np.where(winner == u * size + v, dy, 0) / size**2", "divided by the number of pixels of a window"),
        (POOL, "np.where(winner == u * size + v, -dy, 0)", "the sign"),
        (POOL, "(winner == u * size + v) * dy", "where dy is NaN(?s:.*)0 \\* NaN is NaN"),
        (POOL, "np.where(winner == u * 2 + v, dy, 0)", r"on x \(1, 6, 3, 1\), size=3"),
        ("dy.dtype)\n", "'float64')\n", "dtype float32"),
        ("height * size, width * size, channels", "height, width, channels", "ValueError: could not broadcast"),
        ("return dx", "return dx[:, ::-1]", "reversed along axis 1"),
        ("return dx", "return dx[0]", "an axis is gone"),
    ],
    "conv2d_dweight": [
        (DWEIGHT, DWEIGHT.replace("[u, v] =", "[v, u] ="), "rows and columns of the kernel are exchanged"),
        (DWEIGHT, DWEIGHT.replace("[u, v] =", "[-1 - u, -1 - v] ="), "turned by 180 degrees"),
        (DWEIGHT, DWEIGHT.replace("met, dy)", "met, np.ones_like(dy))"), "the upstream gradient is ignored"),
        (DWEIGHT, DWEIGHT.replace("met, dy)", "met[-1:], dy[-1:])"), "only the last image has counted"),
        (DWEIGHT, DWEIGHT.replace("met, dy)", "met[:1], dy[:1])"), "only the first image has counted"),
        (DWEIGHT, DWEIGHT.replace("met, dy)", "met[-1:, -1:, -1:], dy[-1:, -1:, -1:])"), "only the last pixel"),
        (DWEIGHT, DWEIGHT.replace("met, dy)", "met[:, :-1, :-1], dy[:, :-1, :-1])"), "ends one too early"),
        (DWEIGHT, f"{DWEIGHT[:-1]}) / len(dy)", "2 is N, the number of images"),
        (DWEIGHT, f"{DWEIGHT[:-1]}) / dy[..., 0].size", "12 is the number of pixels of dy, over all images"),
        (DWEIGHT, DWEIGHT.replace("= np", "= -np"), "the sign"),
        (DWEIGHT, DWEIGHT.replace("nijc,nijo->co", "nijc,nijo->oc"), "ValueError: could not broadcast"),
        ("return dweight", "return dweight.swapaxes(2, 3)", "axes are exchanged"),
        ("np.pad(cache.x, ((0, 0), *cache.pad, (0, 0)))", "cache.x", "ValueError"),
        (
            "np.pad(cache.x, ((0, 0), *cache.pad, (0, 0)))",
            "np.pad(cache.x, ((0, 0), *((0, a + b) for a, b in cache.pad), (0, 0)))",
            "the padding of forward is missing",
        ),
        ("s = cache.stride", "s = 1", "the stride of forward is missing"),
        (DWEIGHT, DWEIGHT.replace("= np.einsum", "= abs(np.einsum").replace("dy)", "dy))"), "signs are lost"),
        ("np.zeros_like(cache.weight)", "np.zeros(cache.weight.shape)", "dtype float32"),
        ("np.zeros_like(cache.weight)", "cache.weight", "the cache as it was"),
    ],
    "conv2d_dx": [
        (DX, DX.replace("+=", "="), "= where it should be \\+=: windows overlap, and all but the last contribution"),
        (DX, DX.replace("weight[u, v].T", "weight[u, v]"), "weight\\[u, v\\] is not transposed"),
        (DX, DX.replace("weight[u, v]", "weight[-1 - u, -1 - v]"), "turned by 180 degrees"),
        (DX, DX.replace("weight[u, v]", "weight[v, u]"), "rows and columns of the kernel"),
        (DX, DX.replace("dy", "np.ones_like(dy)"), "the upstream gradient is ignored"),
        (DX, f"{DX}\n            break", "64 numbers of 80 that differ"),
        (DX, f"{DX}\n            return dx_pad[:, top : top + rows, left : left + columns]", "only the first tap"),
        (DX, DX.replace("weight[u, v].T", "weight[u, v].T * (u == v == weight.shape[0] - 1)"), "only the last tap"),
        (DX, DX.replace("weight[u, v].T", "weight[u, v].T * (u == v == 1)"), "only the middle tap"),
        (DX, DX.replace("+=", "-="), "the sign"),
        (DX, f"{DX} / len(dy)", "2 is N, the number of images"),
        ("top : top + rows, left : left + columns", ":rows, :columns", "the border is cut off at the wrong side"),
        ("return dx_pad[:, top : top + rows, left : left + columns]", "return dx_pad", "was padding left on it"),
        ("s, weight = cache.stride, cache.weight", "s, weight = 1, cache.weight", "the stride of forward is missing"),
        (", dy.dtype)", ")", "dtype float32"),
        ("n, rows + top + bottom, columns", "n, rows, columns", "ValueError: "),
    ],
    "batch_norm2d": [
        (NORM, "dy * cache.gamma * cache.inverse_std", "taken for constants"),
        (NORM, NORM.replace(" - dbeta / m", ""), "the mean's term is missing"),
        (NORM, NORM.replace(" - cache.x_hat * dgamma / m", ""), "the variance's term is missing"),
        (NORM, NORM.replace("- dbeta", "+ dbeta"), "the mean's term has the wrong sign"),
        (NORM, NORM.replace("- cache.x_hat", "+ cache.x_hat"), "the variance's term has the wrong sign"),
        ("m = dy[..., 0].size", "m = len(dy)", "m is N, the number of images"),
        ("m = dy[..., 0].size", "m = dy[0, ..., 0].size", "m is H\\*W"),
        ("m = dy[..., 0].size", "m = dy.size", "m is the number of all values"),
        ("m = dy[..., 0].size", "m = dy[..., 0].size - 1", "the biased one"),
        ("m = dy[..., 0].size", "m = 1", "the sums are not divided by m"),
        (NORM, NORM.replace(" * cache.gamma", ""), "gamma is missing"),
        (NORM, NORM.replace(" * cache.inverse_std", ""), "inverse_std is missing"),
        (NORM, NORM.replace("cache.inverse_std", "cache.inverse_std**2"), "inverse_std is squared"),
        (NORM, NORM.replace("* cache.inverse_std", "/ cache.inverse_std"), "multiply"),
        ("if cache.training:", "if True:", "training=False(?s:.*)in inference the running statistics are constants"),
        ("(dy * cache.x_hat).sum(", "dy.sum(", "dgamma lacks its x_hat"),
        ("return dx, dgamma, dbeta", "return dx, dbeta, dbeta", "two that share theirs"),
        ("return dx, dgamma, dbeta", "return dx, dbeta, dgamma", "dgamma of(?s:.*)x_hat is missing"),
        ("return dx, dgamma, dbeta", "return dx, dgamma / m, dbeta", "dgamma of(?s:.*)a mean where it should be a sum"),
        ("return dx, dgamma, dbeta", "return dx, dgamma, dbeta / m", "dbeta of(?s:.*)a mean where it should be a sum"),
        ("return dx, dgamma, dbeta", "return dx, dgamma * cache.gamma, dbeta", "gamma is too much here"),
        ("return dx, dgamma, dbeta", "return dx, cache.x_hat.sum(axis=(0, 1, 2)), dbeta", "only x_hat, without dy"),
        ("return dx, dgamma, dbeta", "return dx, dgamma * cache.inverse_std, dbeta", "x_hat times inverse_std"),
        ("return dx, dgamma, dbeta", "return dx", "expected +a tuple \\(dx, dgamma, dbeta\\)"),
        ("return dx, dgamma, dbeta", "return dx, dgamma, dgamma", "results with memory of their own"),
        ("return dx, dgamma, dbeta", "return dx, dgamma, dy.sum(axis=0)", "shape \\(2,\\)(?s:.*)shape \\(2, 4, 2\\)"),
        (
            "return dx, dgamma, dbeta",
            "dy -= dbeta / m\n    return dx, dgamma, dbeta",
            "dy, the upstream gradient, as it",
        ),
    ],
    "skip": [
        (SKIP, "dfeatures = max_pool2d_backward(dpooled, cache.pool)", "the skip's gradient is dropped"),
        (SKIP, "dfeatures = dskip.copy()", "the way down is dropped"),
        (SKIP, "dfeatures = dskip", "memory shared with dy"),
        (SKIP, "dskip += max_pool2d_backward(dpooled, cache.pool)\n    dfeatures = dskip.copy()", "on a view of it"),
        (SKIP, f"{SKIP} / 1\n    dfeatures /= 2", "the mean of the two"),
        (SKIP, SKIP.replace("dskip +", "dskip -"), "the difference of the two gradients: they"),
        (SKIP, SKIP.replace("dskip +", "-dskip +"), "the other way round"),
        (SKIP, SKIP.replace("dskip +", "dskip *"), "the product of the two"),
        (SKIP, SKIP.replace("dskip +", "2 * dskip +"), "the skip's gradient is counted twice"),
        (SKIP, SKIP.replace("dskip +", "dskip + 2 *"), "the gradient from below is counted twice"),
        ("dup, dskip = dy", "dskip, dup = dy", "the split is in the wrong order"),
        (
            "up_channels = cache.concat.up_channels",
            "up_channels = dy.shape[3] // 2",
            "a call of level_backward(?s:.*)ValueError",
        ),
        ("conv_transpose2d_backward(dup", "conv_transpose2d_backward(np.ones_like(dup)", "NameError: name 'np'"),
        ("return dfeatures, dweight", "return dweight, dfeatures", "expected +shape \\(2, 4, 6, 3\\)"),
        ("return dfeatures, dweight", "return dfeatures, -dweight", "dweight of(?s:.*)the sign"),
        ("return dfeatures, dweight", "return dfeatures", "expected +a tuple \\(dfeatures, dweight\\)"),
    ],
    "dice_loss": [
        (DICE, DICE.replace("(dice - 2 * target)", "(2 * target - dice)"), "the sign"),
        (DICE, DICE.replace("2 * target", "target"), "the factor 2 of the numerator is missing"),
        (DICE, DICE.replace("(dice - 2", "(0 - 2"), "the denominator is taken for a constant"),
        (DICE, DICE.replace("2 * target", "0 * target"), "the numerator is taken for a constant"),
        (DICE, DICE.replace("(denominator *", "(denominator**2 *"), "divided by the denominator squared"),
        (DICE, DICE.replace("denominator * ", ""), "not divided by the denominator"),
        (DICE, DICE.replace(" * dice.size", ""), "over=image(?s:.*)the losses of the images are averaged"),
        (DICE, DICE.replace("dice.size", "target.size"), "divided by the number of pixels"),
        (DICE, DICE.replace("(dice - 2", "(1 - 2"), "1 for Dice"),
        (DICE, DICE.replace("(dice - 2", "(1 - dice - 2"), "the loss, 1 - Dice, stands where Dice belongs"),
        (DICE, DICE.replace("dice.size", "len(target)"), "over=batch(?s:.*)always divided by the number of images"),
        ("return gradient.astype(target.dtype)", "return gradient", "dtype float32(?s:.*)dtype float64"),
        ("return gradient.astype(target.dtype)", "return gradient.sum(axis=0).astype(target.dtype)", "an axis is gone"),
        (DICE, f"target *= 2\n    {DICE}", "the cache as it was"),
        (DICE, DICE.replace("(dice - 2 * target)", "2 * (dice - 2 * target)"), "2 times what it should be"),
    ],
    "adamw": [
        (
            "theta = theta - lr * weight_decay * theta",
            "g = g + weight_decay * theta",
            "weight decay is part of the gradient",
        ),
        ("theta = theta - lr * weight_decay * theta\n", "\n", "weight decay is missing"),
        ("lr * weight_decay * theta", "weight_decay * theta", "the decay is not multiplied by lr"),
        ("theta - lr * weight_decay", "theta + lr * weight_decay", "the decay has the wrong sign"),
        (
            STEP,
            f"theta = theta / (1 - lr * weight_decay)\n    {STEP}\n    theta = theta - lr * weight_decay * theta",
            "the decay is taken of theta after the step",
        ),
        ("m_hat = m / (1 - beta1**t)", "m_hat = m", "m is not corrected"),
        ("v_hat = v / (1 - beta2**t)", "v_hat = v", "v is not corrected"),
        ("m_hat = m", "t = t - 1\n    m_hat = m", "t is one too small"),
        ("m_hat = m", "t = t + 1\n    m_hat = m", "t is one too large"),
        ("np.sqrt(v_hat) + eps", "np.sqrt(v_hat + eps)", "eps stands inside of the root"),
        ("np.sqrt(v_hat) + eps", "np.sqrt(v_hat)", "eps is missing"),
        ("np.sqrt(v_hat) + eps", "v_hat + eps", "the root is missing"),
        ("theta - lr * m_hat", "theta + lr * m_hat", "the step goes uphill"),
        ("theta - lr * m_hat", "theta - m_hat", "lr is missing in the step"),
        (
            "m = beta1 * m",
            "beta1, beta2 = beta2, beta1\n    m = beta1 * m",
            "m after(?s:.*)beta1 and beta2 are exchanged",
        ),
        ("(1 - beta2) * g * g", "(1 - beta2) * g", "v after(?s:.*)g is not squared"),
        ("m = beta1 * m + (1 - beta1) * g", "m = (1 - beta1) * m + beta1 * g", "beta and 1 - beta are exchanged"),
        ("(1 - beta1) * g", "g", "the factor 1 - beta is missing"),
        ("m = beta1 * m + ", "m = ", "the old mean is not kept"),
        ("return theta, m, v", "return theta, m_hat, v_hat", "the corrected moment is returned"),
        ("theta = theta - lr * weight", "theta -= lr * weight", "theta, m, v and g as they were"),
        ("return theta, m, v", "return theta", "expected +a tuple \\(theta, m, v\\)"),
    ],
    "shifted": [
        ("before = total // 2", "before = total", "all of the padding stands before"),
        ("before = total // 2", "before = 0", "all of the padding stands after"),
        ("return before, total - before", "return before, before", "an odd zero is lost"),
        ("return before, total - before", "return total - before, total - before", "one zero too many"),
        ("return before, total - before", "return kernel // 2, kernel // 2", "kernel // 2 on both sides"),
        ("return before, total - before", "return total - before, before", "the odd zero stands before the pixels"),
        ("return before, total - before", "return 0, 0", "no padding"),
        ("(window * weight)", "(window * weight[::-1, ::-1])", "the kernel is turned by 180 degrees"),
    ],
    "astray": [
        ("+= dy[i, j] * weight", "+= dy[i, j] * weight[::-1, ::-1]", "the kernel is turned by 180 degrees"),
        ("+= dy[i, j] * weight", "-= dy[i, j] * weight", "the sign"),
        ("+= dy[i, j] * weight", "= dy[i, j] * weight", "still = where"),
        (
            "            dx[i : i + k",
            "            if not dx[i : i + k, j : j + k].any():\n                dx[i : i + k",
            "blur_backward, kernel 3 x 3",
        ),
        ("    return dx\n", "    return dx / k**2\n", "0.111111 times what it should be"),
        ("(x[i : i + k, j : j + k] * weight)", "(x[i : i + k, j : j + k] * weight.T)", "blur \\(it was right"),
        (
            "dx[i : i + k, j : j + k] +=",
            "dy[i, j] *= 1.5\n            dx[i : i + k, j : j + k] +=",
            "dy after blur_backward",
        ),
    ],
    "deaf": [
        ("dskip = dskip + max_pool2d", "dskip = max_pool2d", "only what comes from below"),
        ('dskip = dskip + max_pool2d_backward(dx, cache["pool"])', "", "now the way down is dropped"),
        ("dskip = dskip + max_pool2d", "dskip = -dskip + max_pool2d", "what comes across is subtracted"),
        ("dskip = dskip + max_pool2d", "dskip = 2 * dskip + max_pool2d", "what comes across is counted twice"),
        ("dskip = dskip + max_pool2d", "dskip = dskip + 2 * max_pool2d", "what comes from below is counted twice"),
        ("dx = relu_backward(dskip,", "dx = relu_backward(dskip / 2,", "the mean of what"),
        ("concat_forward(x, skip)", "concat_forward(skip, x)", "the logits of forward"),
        (
            'grads["up"], _ = conv_transpose2d_backward(dx,',
            'grads["up"], _ = conv_transpose2d_backward(2 * dx,',
            "grads\\['up'\\]",
        ),
        ("return grads\n", "return list(grads.values())\n", "expected +a dict with"),
    ],
    "smeared": [
        ("for array in (image, mask))", "for array in (image, image[..., :1]))", "dtype uint8"),
        (
            "image, mask = (np.rot90(array, quarters, axes=(0, 1)) for array in (image, mask))",
            "image, mask = np.rot90(image, quarters), np.rot90(mask, -quarters)",
            "turned the other way round",
        ),
        (
            "image, mask = (np.rot90(array, quarters, axes=(0, 1)) for array in (image, mask))",
            "image, mask = np.rot90(image, quarters), np.rot90(mask, 2 * quarters)",
            "the mask is turned twice",
        ),
        (
            "image, mask = (np.rot90(array, quarters, axes=(0, 1)) for array in (image, mask))",
            "image, mask = np.rot90(image, quarters), np.rot90(mask, generator.integers(4))",
            "one more number is drawn",
        ),
        (
            "image, mask = (np.rot90(array, quarters, axes=(0, 1)) for array in (image, mask))",
            "",
            "the images are mirrored, but not turned any more",
        ),
        ("image, mask = image[:, ::-1], mask[:, ::-1]", "pass", "the images are turned, but not mirrored"),
        (
            "image, mask = image[:, ::-1], mask[:, ::-1]",
            "image = image[:, ::-1]",
            "not mirrored with its image any more",
        ),
        (
            "return np.stack(augmented_images), np.stack(augmented_masks)",
            "return images, masks",
            "not augmented any more",
        ),
        (
            "return np.stack(augmented_images), np.stack(augmented_masks)",
            "return np.stack(augmented_images), masks",
            "the masks are not moved at all",
        ),
        (
            "return np.stack(augmented_images), np.stack(augmented_masks)",
            "images[...] = np.stack(augmented_images)\n    return images, np.stack(augmented_masks)",
            "images and masks as they were",
        ),
    ],
    "negative": [
        ("(2 * overlap + smooth) / (total + smooth)", "2 * (overlap + smooth) / (total + smooth)", "has Dice 2"),
        ("(2 * overlap + smooth) / (total + smooth)", "2 * overlap / (total + smooth)", "smooth is missing above"),
        (
            "(2 * overlap + smooth) / (total + smooth)",
            "(2 * overlap + smooth) / max(total, 1e-9)",
            "dice_loss of two empty masks",
        ),
        ("(2 * overlap + smooth) / (total + smooth)", "2 * overlap / total + smooth", "0 / 0 has happened already"),
        ("(2 * overlap + smooth) / (total + smooth)", "2 * (overlap + smooth) / (total + 2 * smooth)", "counts twice"),
        (
            "(2 * overlap + smooth) / (total + smooth)",
            "(overlap + smooth) / (total + smooth)",
            "the factor 2 is missing",
        ),
        (
            "(2 * overlap + smooth) / (total + smooth)",
            "min(2 * (overlap + smooth) / (total + smooth), 1.0)",
            "cut off at 1",
        ),
        ("return float(1 - dice)", "return float(dice)", "this is Dice itself"),
    ],
    "company": [
        ("forward(net, x, training=False)", "forward(net, x, training=True)", "a slice is judged by its neighbours"),
        (
            "mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))",
            "mean, var = net.running_mean, net.running_var",
            "training uses the running statistics now",
        ),
        ("mean, var = net.running_mean, net.running_var", "mean, var = 0.0, 1.0", "no normalisation at all"),
        (
            "mean, var = net.running_mean, net.running_var",
            "mean, var = net.running_mean, x.var(axis=(0, 1, 2))",
            "the running mean with the variance of the batch",
        ),
        (
            "mean, var = net.running_mean, net.running_var",
            "mean, var = x.mean(axis=(0, 1, 2)), net.running_var",
            "the mean of the batch with the running variance",
        ),
        (
            "probabilities, _, _ = forward(net, x, training=False)",
            "probabilities = train_step(net, x)",
            "the statistics of the batch",
        ),
        (
            "probabilities, _, _ = forward(net, x, training=False)",
            "probabilities = np.concatenate([forward(net, one[None])[0] for one in x])",
            "each slice by its own statistics",
        ),
        (
            "probabilities, _, _ = forward(net, x, training=False)",
            "probabilities, _, _ = forward(net, x, training=False)\n    train_step(net, x)",
            "predict updates the running statistics",
        ),
        ("momentum: float = 0.9", "momentum: float = 0.5", "net.running_mean after 20 training steps"),
    ],
    "timid": [
        ("return weight * x + bias", "return sigmoid(weight * x + bias)", "still twice"),
        ("return sigmoid(network(x, weight, bias))", "return network(x, weight, bias)", "these are the logits"),
        ("return sigmoid(network(x, weight, bias))", "return 1 - sigmoid(network(x, weight, bias))", "the other class"),
        (
            "    loss = -(target",
            "    p = sigmoid(p)\n    loss = -(target",
            "the loss still goes through the sigmoid twice",
        ),
        (".mean()", ".sum()", "a sum where it should be a mean"),
        ("dz = (p - target) / x.size", "dz = (p - target) * p * (1 - p) / x.size", "p \\(1 - p\\) is too much"),
        ("dz = (p - target) / x.size", "dz = (sigmoid(p) - target) / x.size", "the slope still comes from"),
        ("dz = (p - target) / x.size", "dz = p - target", "12 times(?s:.*)the number of pixels"),
        ("float(loss), ", "", "expected +a tuple \\(loss, dweight, dbias\\)"),
    ],
    "stubborn": [
        ("self.theta -= self.lr * self.weight_decay * self.theta", "", "weight decay is missing"),
        (
            "self.theta -= self.lr * self.weight_decay * self.theta",
            "g = g + self.weight_decay * self.theta",
            "weight decay is part of the gradient",
        ),
        ("self.lr * self.weight_decay * self.theta", "self.weight_decay * self.theta", "not multiplied by lr"),
        ("self.theta -= self.lr * self.weight_decay", "self.theta += self.lr * self.weight_decay", "the wrong sign"),
        (
            "self.theta -= self.lr * self.weight_decay * self.theta",
            "self.theta = self.theta - self.lr * self.weight_decay * self.theta",
            "theta does not move",
        ),
        ("np.sqrt(v_hat) + eps", "v_hat + eps", "the root is missing"),
        ("self.m / (1 - beta1**self.t)", "self.m", "m is not corrected"),
    ],
}

CASES = [pytest.param(name, *wrong, id=f"{name}-{i}") for name in WRONG for i, wrong in enumerate(WRONG[name])]


@pytest.mark.parametrize(("name", "old", "new", "told"), CASES)
def test_a_wrong_solution_is_told_what_is_wrong(name, old, new, told, tmp_path):
    message = refused(name, edited(solution(name), old, new), tmp_path)
    assert re.search(told, message), message


def test_there_are_wrong_solutions_of_every_exercise():
    assert WRONG.keys() == set(EXERCISES)
    assert all(len(WRONG[name]) >= (10 if name in BACKWARD else 7) for name in EXERCISES)


# --- other right solutions: what comes out counts, not how ------------------------------------------------------------

OTHERWISE = {
    "relu": (RELU, "dx = dy.copy()\n    dx[~cache.passed] = 0\n    return dx"),
    "max_pool2d": (
        "    for u in range(size):\n        for v in range(size):\n            dx[:, u::size, v::size] = " + POOL,
        "    for n, i, j, c in np.ndindex(dy.shape):\n"
        "        u, v = divmod(int(winner[n, i, j, c]), size)\n"
        "        dx[n, i * size + u, j * size + v, c] = dy[n, i, j, c]",
    ),
    "conv2d_dweight": (
        DWEIGHT,
        "for place in np.ndindex(dy.shape[:3]):\n                dweight[u, v] += np.outer(met[place], dy[place])",
    ),
    "conv2d_dx": (
        "dx_pad[:, u : u + s * height : s, v : v + s * width : s] " + DX,
        "for i, j in np.ndindex(height, width):\n"
        "                dx_pad[:, s * i + u, s * j + v] += dy[:, i, j] @ weight[u, v].T",
    ),
    "batch_norm2d": (
        "dx = " + NORM,
        "dx_hat = dy * cache.gamma\n"
        "        axes = (0, 1, 2)\n"
        "        dx = m * dx_hat - dx_hat.sum(axis=axes) - cache.x_hat * (dx_hat * cache.x_hat).sum(axis=axes)\n"
        "        dx = dx * cache.inverse_std / m",
    ),
    "skip": (SKIP, "dfeatures = max_pool2d_backward(dpooled, cache.pool)\n    dfeatures += dskip"),
    "dice_loss": (DICE, "gradient = -(2 * target * denominator - dice * denominator) / denominator**2 / dice.size"),
    "adamw": (STEP, "theta = theta + -lr * m_hat / (v_hat**0.5 + eps)"),
    "shifted": ("return before, total - before", "return total // 2, (total + 1) // 2"),
    "astray": ("dx[i : i + k, j : j + k] += dy[i, j] * weight", "dx[i : i + k, j : j + k] += weight * dy[i][j]"),
    "deaf": ("dskip = dskip + max_pool2d", "dskip += max_pool2d"),
    "smeared": (
        "image, mask = (np.rot90(array, quarters, axes=(0, 1)) for array in (image, mask))",
        "image = np.rot90(image, quarters)\n        mask = np.rot90(mask, quarters)",
    ),
    "negative": ("(2 * overlap + smooth) / (total + smooth)", "1 - (total - 2 * overlap) / (total + smooth)"),
    "company": ("training: bool = True) ->", "training: bool = False) ->"),
    "timid": (
        "    return weight * x + bias\n\n\ndef probabilities(x: Array, weight: float, bias: float) -> Array:\n"
        '    """The probability that each pixel is tumour."""\n    return sigmoid(network(x, weight, bias))',
        "    return sigmoid(weight * x + bias)\n\n\ndef probabilities(x: Array, weight: float, bias: float) -> Array:\n"
        "    return network(x, weight, bias)",
    ),
    "stubborn": (
        "self.theta -= self.lr * self.weight_decay * self.theta",
        "self.theta *= 1 - self.lr * self.weight_decay",
    ),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_another_right_solution_is_right(name, tmp_path):
    assert check(name, edited(solution(name), *OTHERWISE[name]), tmp_path)


RIGHT = np.array([[1.0, 2.0], [4.0, 8.0]])


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (-RIGHT, "the sign"),
        (RIGHT / 4, "every number is 1/4 of what it should be, and 4 is N"),
        (3 * RIGHT, "every number is 3 times what it should be"),
        (RIGHT * np.nan, "NaN or infinity"),
        (0 * RIGHT, "all zeros"),
        (0 * RIGHT + 5, "one and the same number everywhere"),
        (RIGHT + 1, "off by the same amount everywhere"),
        (RIGHT[::-1], "the right numbers, reversed along axis 0"),
        (RIGHT.T, "the right numbers at the wrong places"),
        (RIGHT**2, "squared, by mistake"),
        (RIGHT * (1 + 1e-11), "nearly right"),
        (RIGHT * 1e300, "times what it should be"),
    ],
)
def test_what_is_seen_from_the_numbers(found, told):
    assert told in likely_cause(found, RIGHT, {"squared, by mistake": RIGHT**2, "nothing": RIGHT}, {"N": 4})


def test_an_array_that_fits_no_mistake_gets_no_guess():
    assert likely_cause(RIGHT**3, RIGHT, {"squared": RIGHT**2}, {"N": 4}) == ""


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, 0.0])
def test_infinity_is_not_nan(wrong):
    with pytest.raises(NotYet):
        require_equal("x", np.array([1.0, wrong]), np.array([1.0, np.nan]))


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize("returned", ["None", "1.5", "'text'", "()", "[1.0, None]", "(None, None)", "object()", "{}"])
def test_whatever_a_function_returns_is_answered(name, returned, tmp_path):
    """Never by a traceback of the checker."""
    for function in find(name).functions:
        if (name, function) == ("astray", "sharpen") or (name, function) == ("company", "forward"):
            continue  # what these return is not looked at
        refused(name, f"{solution(name)}\n\ndef {function}(*_, **__):\n    return {returned}\n", tmp_path)


# --- the command line -------------------------------------------------------------------------------------------------


def command(*arguments, cwd):
    """The command as people type it: its exit code, and what it says."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OPENBLAS_NUM_THREADS": "1"}
    python = [sys.executable, "-W", "error", "-m", "minunet.exercises", *map(str, arguments)]
    done = subprocess.run(python, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_from_the_list_to_a_solution(tmp_path):
    code, said, _ = command(cwd=tmp_path)
    assert code == 0
    assert all(f"  {name} " in said for name in EXERCISES)
    code, said, _ = command("start", "relu", cwd=tmp_path)
    assert (code, said) == (0, "relu.py: edit it, then run: python -m minunet.exercises relu relu.py\n")
    code, said, error = command("relu", cwd=tmp_path)
    assert (code, error) == (1, "")
    assert "not written yet" in said
    (tmp_path / "relu.py").write_text(solution("relu"))
    code, said, error = command("relu", cwd=tmp_path)
    assert (code, error) == (0, "")
    assert said.startswith("relu: right\n")
    code, _, error = command("start", "relu", cwd=tmp_path)
    assert (code, error) == (2, "error: relu.py: is there already, choose another file with --to\n")
    assert (tmp_path / "relu.py").read_text() == solution("relu")


def test_hints(capsys):
    for number in (1, 2, 3):
        main(["relu", "--hint", str(number)])
        assert find("relu").hints[number - 1] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "file", "said"),
    [
        (["rely"], None, "NAME: there is no exercise 'rely', choose one of relu, max_pool2d, "),
        (["start", "rely"], None, "NAME: there is no exercise 'rely'"),
        (["start", "relu", "--to", "no/such/folder.py"], None, "no/such/folder.py: cannot be written"),
        (["relu", "other.py"], None, "other.py: not found, write one to begin with"),
        (["relu", "."], None, ".: cannot be read (Is a directory)"),
        (["relu", "--hint", "4"], None, "--hint: must be a whole number from 1 to 3, got '4', see --help"),
        (["--hint", "1"], None, "--hint: of which exercise? give its NAME first"),
        (["relu"], b"def relu_backward(dy, cache)\n", "relu.py, line 1: SyntaxError: expected ':', mend that first"),
        (["relu"], b"\nx = 1 / 0\n", "relu.py, line 2: ZeroDivisionError: division by zero in: x = 1 / 0; mend"),
        (["relu"], b"exit(0)\n", "relu.py, line 1: SystemExit: 0 in: exit(0); mend that first"),
        (["relu"], b"x = 1\n", "relu.py: has no function relu_backward"),
        (["relu"], b"relu_backward = 1\n", "relu.py: has no function relu_backward"),
        (["relu"], b"\xff\xfe", "relu.py: cannot be read (not UTF-8 text)"),
        (["relu"], b"\0", "relu.py, line "),
    ],
)
def test_what_a_person_can_put_right_is_one_line(arguments, file, said, tmp_path):
    if file is not None:
        (tmp_path / "relu.py").write_bytes(file)
    code, out, error = command(*arguments, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_an_error_in_a_helper_shows_the_learners_line(tmp_path):
    text = "def helper(x):\n    return x[99]\n\ndef relu_backward(dy, cache):\n    return helper(dy)\n"
    message = refused("relu", text, tmp_path)
    assert re.search(r"raised +IndexError: .*\n +at +line 2: return x\[99\]", message)


def test_the_page_quotes_a_real_answer(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "exercises.md").read_text()
    quote = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Path("max_pool2d.py").write_text(edited(solution("max_pool2d"), "u * size + v", "v * size + u"))
    with pytest.raises(SystemExit):
        main(["max_pool2d"])
    assert capsys.readouterr().out.startswith(quote)


def test_the_page_lists_every_exercise():
    page = (ROOT / "docs" / "exercises.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(EXERCISES)
