"""What a test of this project may not do, held by reading the test files as syntax trees.

- Send ones into a backward pass. What sums to zero over the outputs, such as the third term of batch norm, is then not
  seen: the upstream gradient is random.
- Compare a gradient with an absolute tolerance. A gradient of 1e-9 would pass with any mistake in it.
- Assert nothing, or something that is always true.

Gradients are known by their names: dx, dweight, dlogits, grads, ...
"""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

GRADIENT = re.compile(
    r"d(x|y|weight|bias|gamma|beta|up|skip|logits|probabilities)(\d+|_\w+)?|\w*grad(s|ient|ients)?(_\w+|\d+)?"
)
UPSTREAM = re.compile(r"d(y|logits|skip|out)(\d+|_\w+)?|upstream\w*")


def faults(sources):
    """``{file name: source}`` -> a line for each rule that a test breaks."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    asserting = asserting_functions(trees.values())
    found = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            for rule in (ones_upstream, absolute_tolerance, cannot_fail):
                if message := rule(node):
                    found.append(f"{name}:{node.lineno}: {message}")
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test") and not asserts(node, asserting):
                found.append(f"{name}:{node.lineno}: {node.name} asserts nothing")
    return found


def called(node):
    """The last name of what a call calls: ``ones`` of ``np.ones(3)``."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def names_in(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
    }


def mentions_gradient(node):
    return any(GRADIENT.fullmatch(name) for name in names_in(node))


def is_ones(node):
    name = called(node)
    return name in ("ones", "ones_like") or (
        name in ("full", "full_like") and ast.unparse(node.args[1]) in ("1", "1.0")
    )


def ones_upstream(node):
    if isinstance(node, ast.Assign) and is_ones(node.value):
        targets = {t.id for target in node.targets for t in ast.walk(target) if isinstance(t, ast.Name)}
        if any(UPSTREAM.fullmatch(name) for name in targets):
            return "an upstream gradient of ones"
    if called(node).endswith("backward"):
        given = [*node.args[:1], *(k.value for k in node.keywords if k.arg and UPSTREAM.fullmatch(k.arg))]
        if any(is_ones(value) for value in given):
            return "an upstream gradient of ones"
    return ""


def absolute_tolerance(node):
    """approx and allclose have one unless it is set to 0; a comparison has one if its bound is a bare number."""
    if isinstance(node, ast.Call) and called(node) in ("approx", "allclose", "isclose"):
        keyword = "abs" if called(node) == "approx" else "atol"
        is_zero = any(k.arg == keyword and ast.unparse(k.value) in ("0", "0.0") for k in node.keywords)
        if not is_zero and called(node) != "approx" and mentions_gradient(node):
            return f"{called(node)} of a gradient without {keyword}=0"
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for operand in operands:
            is_zero = any(
                k.arg == "abs" and ast.unparse(k.value) in ("0", "0.0") for k in getattr(operand, "keywords", [])
            )
            if called(operand) == "approx" and not is_zero and mentions_gradient(node):
                return "approx of a gradient without abs=0"
        small = isinstance(node.ops[0], ast.Lt | ast.LtE) and is_number(node.comparators[0])
        differs = any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub | ast.Add) for n in ast.walk(node.left))
        scaled = any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div) for n in ast.walk(node.left))
        takes_abs = any(called(n) == "abs" for n in ast.walk(node.left))
        if small and takes_abs and differs and not scaled and mentions_gradient(node.left):
            return "a gradient within a bare number: an absolute tolerance"
    return ""


def is_number(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, float | int) and node.value != 0


def cannot_fail(node):
    if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant | ast.Tuple | ast.JoinedStr):
        return "an assertion that cannot fail" if getattr(node.test, "value", True) else ""
    return ""


def asserts(function, asserting):
    """Whether a function asserts: by itself, by pytest or NumPy, or by a helper that does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if (
            called(node) in ("raises", "warns", "fail")
            or called(node).startswith("assert")
            or called(node) in asserting
        ):
            return True
    return False


def asserting_functions(trees):
    """The names of the helpers that assert, or that call one which does."""
    helpers = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("test")
    ]
    known = set()
    while True:
        more = {helper.name for helper in helpers if asserts(helper, known)}
        if more == known:
            return known
        known = more


def test_no_test_file_breaks_a_rule():
    sources = {str(path.relative_to(TESTS)): path.read_text() for path in sorted(TESTS.rglob("*.py"))}
    assert sum(name.rpartition("/")[2].startswith("test_") for name in sources) >= 30
    assert faults(sources) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("dy = np.ones(y.shape)\n    assert op_backward(dy, cache).any()", "an upstream gradient of ones"),
        ("dy = np.ones_like(y)\n    assert op_backward(dy, cache).any()", "an upstream gradient of ones"),
        ("assert conv2d_backward(np.ones(y.shape), cache)[0].any()", "an upstream gradient of ones"),
        ("assert layer.backward(xp.full(y.shape, 1.0), cache)", "an upstream gradient of ones"),
        ("assert net.backward(dlogits=np.ones_like(y), cache=cache)", "an upstream gradient of ones"),
        ("assert np.allclose(dx, expected)", "allclose of a gradient without atol=0"),
        ("assert np.allclose(grads['w'], expected, rtol=1e-3, atol=1e-8)", "allclose of a gradient without atol=0"),
        ("assert np.isclose(gradient, expected).all()", "isclose of a gradient without atol=0"),
        ("assert dweight == pytest.approx(expected, rel=1e-6)", "approx of a gradient without abs=0"),
        ("assert np.abs(dx - expected).max() <= 1e-9", "a gradient within a bare number: an absolute tolerance"),
        ("assert abs(dgamma[0] - 3) < 1e-9", "a gradient within a bare number: an absolute tolerance"),
        ("x = 1", "test_it asserts nothing"),
        ("helper_that_prints(x)", "test_it asserts nothing"),
        ("assert True", "an assertion that cannot fail"),
        ("assert (x == 1, 'x is one')", "an assertion that cannot fail"),
    ],
)
def test_a_bad_test_is_found(body, message):
    source = f"def helper_that_prints(x):\n    print(x)\n\ndef test_it():\n    {body}\n"
    assert [fault.split(": ", 1)[1] for fault in faults({"test_bad.py": source})] == [message]


@pytest.mark.parametrize(
    "body",
    [
        "dy = np.full(y.shape, 3.0)\n    assert op_backward(dy, cache).any()",
        "dy = rng.standard_normal(y.shape)\n    assert op_backward(dy, cache).any()",
        "x = np.ones(3)\n    assert op_forward(x)[0].any()",
        "assert np.abs(dx - expected).max() <= 1e-13 * np.abs(expected).max()",
        "assert np.abs(dx - expected).max() / np.abs(expected).max() <= 1e-13",
        "assert np.allclose(dx, expected, rtol=1e-13, atol=0)",
        "assert dx == pytest.approx(expected, rel=1e-13, abs=0)",
        "assert abs(loss - 1) <= 1e-9",
        "with pytest.raises(ValueError, match='x'):\n        op_forward(None)",
        "np.testing.assert_array_equal(x, y)",
        "check_it(x)",
        "check_twice(x)",
    ],
)
def test_a_good_test_passes(body):
    helpers = "def check_it(x):\n    assert x\n\ndef check_twice(x):\n    check_it(x)\n    check_it(x)\n\n"
    assert faults({"test_good.py": f"{helpers}def test_it():\n    {body}\n"}) == []
