"""docs/interactive, in a real browser: its numbers are minunet's, and keys, touch and small screens work.

Tests that need a browser skip where there is none: tests/conftest.py says which one they look for.
"""

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from minunet import UNet, ops
from minunet.data.normalize import VolumeStatistics, apply
from minunet.network.layers import map_arrays
from minunet.network.loss import segmentation_loss_backward, segmentation_loss_forward
from minunet.ops.bce_with_logits import bce_with_logits_backward, bce_with_logits_forward
from minunet.ops.dice_loss import dice_loss_backward, dice_loss_forward
from minunet.summary import summary
from minunet.training.metrics import count, dice, iou

FOLDER = Path(__file__).parents[2] / "docs" / "interactive"
PAGES = ("index", "convolution", "dice", "explorer")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

spec = importlib.util.spec_from_file_location("export_explorer", FOLDER / "export_explorer.py")
assert spec is not None
assert spec.loader is not None
exporter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(exporter)


# --- the browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(browser):
    """Opens a page from the disk. Whatever it says on the console, and any call to a network, ends up in ``faults``."""
    contexts = []

    def open_page(name, viewport=WIDE, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)  # a machine may be busy with other tests
        page.faults = []
        page.on("console", lambda message: page.faults.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("requestfailed", lambda request: page.faults.append(f"missing: {request.url}"))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:")) or page.faults.append(request.url)
        )
        page.goto((FOLDER / f"{name}.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def explorer(opened):
    """One explorer.html for all that only asks it for numbers: it has ops.js and unet.js."""
    return opened("explorer")


#: Turns the arguments into arrays of ops.js, runs the body, and turns the arrays of its result back. All of it travels
#: as text, which is a hundred times faster than as a million values that Playwright wraps one by one.
RUN = """([body, text]) => {
  const a = JSON.parse(text).map((arg) => (arg && arg.shape ? tensor(arg.shape, arg.data) : arg));
  const plain = (key, value) => (value instanceof Float64Array ? [...value] : value);
  return JSON.stringify(new Function("a", body)(a), plain);
}"""


def computed(page, body, *args):
    """What the JavaScript ``body``, with ``args`` as its array ``a``, returns: an object of arrays and numbers."""
    sent = [{"shape": a.shape, "data": a.ravel().tolist()} if isinstance(a, np.ndarray) else a for a in args]
    result = json.loads(page.evaluate(RUN, [body, json.dumps(sent)]))
    arrays = {name: v for name, v in result.items() if isinstance(v, dict) and "shape" in v}
    return result | {name: np.array(v["data"], float).reshape(v["shape"]) for name, v in arrays.items()}


def assert_same(actual, expected):
    """Equal to 1e-6 of the largest value, and of the same shape."""
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    scale = max(np.abs(expected).max(), 1e-300)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * scale)


# --- ops.js -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kernel", "channels", "stride", "padding"),
    [
        ((1, 6, 6, 1), (3, 3), 1, 1, "same"),
        ((1, 6, 6, 1), (3, 3), 1, 2, "same"),
        ((2, 5, 7, 3), (3, 3), 2, 2, "same"),
        ((1, 6, 6, 1), (3, 3), 1, 1, 0),
        ((1, 6, 6, 1), (3, 3), 1, 2, 0),
        ((2, 7, 5, 2), (3, 3), 3, 2, 1),
        ((1, 4, 5, 2), (2, 3), 2, 1, "same"),
        ((2, 4, 4, 3), (1, 1), 2, 1, 0),
        ((1, 5, 6, 1), (3, 3), 2, 3, 2),
    ],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_conv2d(explorer, shape, kernel, channels, stride, padding, with_bias):
    random = np.random.default_rng(0)
    x = random.standard_normal(shape)
    weight = random.standard_normal((*kernel, shape[3], channels))
    bias = random.standard_normal(channels) if with_bias else None
    y, cache = ops.conv2d_forward(x, weight, bias, stride, padding)
    dy = random.standard_normal(y.shape)
    dx, dweight, dbias = ops.conv2d_backward(dy, cache)
    body = """const [x, weight, bias, stride, padding, dy] = a;
        const { y, cache } = conv2dForward(x, weight, bias, stride, padding);
        return { y, ...conv2dBackward(dy, cache) };"""
    found = computed(explorer, body, x, weight, bias, stride, padding, dy)
    assert_same(found["y"], y)
    assert_same(found["dx"], dx)
    assert_same(found["dweight"], dweight)
    if with_bias:
        assert_same(found["dbias"], dbias)
    else:
        assert found["dbias"] is None


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (1, 2), (4, 2), (3, 1)])
def test_conv_transpose2d(explorer, kernel, stride):
    random = np.random.default_rng(1)
    x, bias = random.standard_normal((2, 3, 4, 3)), random.standard_normal(2)
    weight = random.standard_normal((kernel, kernel, 3, 2))
    y, cache = ops.conv_transpose2d_forward(x, weight, bias, stride)
    dy = random.standard_normal(y.shape)
    dx, dweight, dbias = ops.conv_transpose2d_backward(dy, cache)
    body = """const [x, weight, bias, stride, dy] = a;
        const { y, cache } = convTranspose2dForward(x, weight, bias, stride);
        return { y, ...convTranspose2dBackward(dy, cache) };"""
    found = computed(explorer, body, x, weight, bias, stride, dy)
    for name, expected in {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}.items():
        assert_same(found[name], expected)


def test_max_pool2d_and_relu_at_ties_and_zeros(explorer):
    random = np.random.default_rng(2)
    x = random.integers(-1, 2, (2, 4, 6, 3)).astype("float64")  # few values: many ties, many zeros
    dy, dsmall = random.standard_normal(x.shape), random.standard_normal((2, 2, 3, 3))
    relu, relu_cache = ops.relu_forward(x)
    pool, pool_cache = ops.max_pool2d_forward(x)
    body = """const [x, dy, dsmall] = a; const relu = reluForward(x); const pool = maxPool2dForward(x);
        return { relu: relu.y, drelu: reluBackward(dy, relu.cache),
                 pool: pool.y, dpool: maxPool2dBackward(dsmall, pool.cache) };"""
    found = computed(explorer, body, x, dy, dsmall)
    assert_same(found["relu"], relu)
    assert_same(found["drelu"], ops.relu_backward(dy, relu_cache))
    assert_same(found["pool"], pool)
    assert_same(found["dpool"], ops.max_pool2d_backward(dsmall, pool_cache))


def test_concat_and_batch_norm(explorer):
    random = np.random.default_rng(3)
    up, skip, dy = (random.standard_normal((2, 3, 4, c)) for c in (2, 3, 5))
    gamma, beta, mean, var = random.standard_normal((4, 5)) ** [[1], [1], [1], [2]]
    joined, concat_cache = ops.concat_forward(up, skip)
    y, norm_cache = ops.batch_norm2d_forward(joined, gamma, beta, mean, var, training=False)
    dup, dskip = ops.concat_backward(dy, concat_cache)
    body = """const [up, skip, dy, gamma, beta, runningMean, runningVar] = a;
        const joined = concatForward(up, skip);
        const norm = batchNorm2dForward(joined.y, { gamma, beta, runningMean, runningVar });
        const dx = batchNorm2dBackward(dy, norm.cache);
        return { joined: joined.y, ...concatBackward(dy, joined.cache), y: norm.y, dx };"""
    found = computed(explorer, body, up, skip, dy, gamma, beta, mean, var)
    dx, _, _ = ops.batch_norm2d_backward(dy, norm_cache)
    for name, expected in {"joined": joined, "dup": dup, "dskip": dskip, "y": y, "dx": dx}.items():
        assert_same(found[name], expected)


LOGITS = {
    "random": lambda random, shape: 3 * random.standard_normal(shape),
    "sure of nothing": lambda random, shape: np.full(shape, -40.0),
    "far out": lambda random, shape: random.choice([-800.0, -5.0, 0.0, 5.0, 800.0], shape),
}
TARGETS = {
    "random": lambda random, shape: (random.random(shape) < 0.3).astype("float64"),
    "empty": lambda random, shape: np.zeros(shape),
    "full": lambda random, shape: np.ones(shape),
    "one of two empty": lambda random, shape: np.stack([np.zeros(shape[1:]), np.ones(shape[1:])]),
}


@pytest.mark.parametrize("logits_kind", LOGITS)
@pytest.mark.parametrize("target_kind", TARGETS)
@pytest.mark.parametrize(("smooth", "over"), [(1.0, "batch"), (1.0, "image"), (0.01, "image"), (100.0, "batch")])
def test_losses_and_scores(explorer, logits_kind, target_kind, smooth, over):
    random, shape = np.random.default_rng(4), (2, 4, 5, 1)
    logits, target = LOGITS[logits_kind](random, shape), TARGETS[target_kind](random, shape)
    probabilities, _ = ops.sigmoid_forward(logits)
    body = """const [logits, target, smooth, over] = a; const p = map(sigmoid, logits);
        const dice = diceLossForward(p, target, smooth, over), bce = bceWithLogitsForward(logits, target);
        const sum = segmentationLossForward(logits, target, { diceWeight: 2, bceWeight: 0.5, smooth, over });
        return { p, dice: dice.loss, ddice: diceLossBackward(dice.cache), bce: bce.loss,
                 dbce: bceWithLogitsBackward(bce.cache), sum: sum.loss, dsum: segmentationLossBackward(sum.cache),
                 hard: hardScores(p, target) };"""
    found = computed(explorer, body, logits, target, smooth, over)
    dice_loss, dice_cache = dice_loss_forward(probabilities, target, smooth, over)
    bce_loss, bce_cache = bce_with_logits_forward(logits, target)
    sum_loss, sum_cache = segmentation_loss_forward(logits, target, 2.0, 0.5, smooth, over)
    counts = count(probabilities > 0.5, target > 0.5)
    assert_same(found["p"], probabilities)
    assert found["dice"] == pytest.approx(dice_loss.item(), rel=1e-6, abs=1e-12)
    assert found["bce"] == pytest.approx(bce_loss.item(), rel=1e-6, abs=1e-12)
    assert found["sum"] == pytest.approx(sum_loss.item(), rel=1e-6, abs=1e-12)
    assert_same(found["ddice"], dice_loss_backward(dice_cache))
    assert_same(found["dbce"], bce_with_logits_backward(bce_cache))
    assert_same(found["dsum"], segmentation_loss_backward(sum_cache))
    scores = {"dice": dice(counts), "iou": iou(counts)}
    assert found["hard"] == pytest.approx({"tp": counts.tp, "fp": counts.fp, "fn": counts.fn, **scores}, rel=1e-12)


def test_two_empty_masks_agree(explorer):
    body = """const empty = zeros([1, 2, 2, 1]); const { loss } = diceLossForward(empty, empty, 1, "batch");
        const { dice, iou } = hardScores(empty, empty); return { loss, dice, iou };"""
    assert computed(explorer, body) == {"loss": 0, "dice": 1, "iou": 1}
    assert dice(count(np.zeros((1, 2)), np.zeros((1, 2)))) == 1


# --- the explorer's network -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    return exporter.from_javascript((FOLDER / "explorer_data.js").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def net(data):
    """The committed network, as it was trained: in float32."""
    net = UNet(**data["config"], dropout=0.0, conv_bias=False)
    arrays = net.parameters() | net.buffers()
    assert arrays.keys() == data["arrays"].keys()
    for name, array in arrays.items():
        array[...] = exporter.decode(data["arrays"][name])
    return net


def every_line(net, x):
    """What each line of the network computes for ``x``, inferring, by the summary's names; and the caches."""
    lines = {"image": x}

    def double_conv(room, block, x):
        for k, conv, norm in ((1, block.conv1, block.norm1), (2, block.conv2, block.norm2)):
            x = lines[f"{room}.conv{k}"] = conv.forward(x)[0]
            x = lines[f"{room}.norm{k}"] = norm.forward(x, training=False)[0]
            x = lines[f"{room}.relu{k}"] = ops.relu_forward(x)[0]
        return x

    skips = []
    for level, down in enumerate(net.downs, start=1):
        skips.append(double_conv(f"down{level}", down.convs, x))
        x = lines[f"down{level}.pool"] = ops.max_pool2d_forward(skips[-1])[0]
    x = double_conv("bottleneck", net.bottleneck, x)
    for level in range(net.depth, 0, -1):
        up = net.ups[level - 1]
        x = lines[f"up{level}.up"] = up.up.forward(x)[0]
        x = lines[f"up{level}.concat"] = ops.concat_forward(x, skips[level - 1])[0]
        x = double_conv(f"up{level}", up.convs, x)
    lines["head"] = net.head.forward(x)[0]
    return lines


def test_the_exporter_writes_what_is_committed(data, net):
    again = exporter.export(net)
    assert again["config"] == data["config"] | {"widths": tuple(data["config"]["widths"])}
    assert again["arrays"] == data["arrays"]
    for new, old in zip(again["images"], data["images"], strict=True):
        computed = {"logits": None, "normalization": None}
        assert new | computed == old | computed  # the images and masks: to the bit
        for name, values in old["normalization"].items():  # sums, whose last digit depends on the processor
            assert new["normalization"][name] == pytest.approx(values, rel=1e-14, abs=0)
        logits = exporter.decode(old["logits"])
        np.testing.assert_allclose(exporter.decode(new["logits"]), logits, rtol=0, atol=1e-10 * np.abs(logits).max())


def test_the_committed_file_is_small_and_its_network_is_trained(data):
    assert (FOLDER / "explorer_data.js").stat().st_size < 1.5e6
    scores = [dice(count(exporter.decode(i["logits"]) > 0, exporter.decode(i["mask"]))) for i in data["images"]]
    assert min(scores) > 0.8


def test_the_exporter_trains_the_same_network_twice():
    texts = {
        exporter.to_javascript(exporter.export(exporter.train(patients=2, epochs=1), patients=2)) for _ in range(2)
    }
    assert len(texts) == 1
    assert exporter.to_javascript(exporter.from_javascript(texts.copy().pop())) in texts


def network_input(image):
    """An exported image as minunet normalises it: (1, H, W, C), float64."""
    statistics = VolumeStatistics(**{name: np.array([values]) for name, values in image["normalization"].items()})
    return apply(exporter.decode(image["pixels"])[None], statistics, "float64")


def test_the_explorer_computes_what_minunet_computes(explorer, data, net):
    double = map_arrays(net, lambda array: array.astype("float64"))
    image = data["images"][0]
    dlogits = np.random.default_rng(5).standard_normal((1, *image["logits"]["shape"]))
    body = """const lines = unetForward(EXPLORER_DATA.config.widths, ARRAYS, normalizedPixels(EXPLORER_DATA.images[0]));
        const { total, arrivals } = unetBackward(lines, "head", a[0]);
        const values = Object.fromEntries(lines.map(({ name, y }) => [name, y]));
        const [skip, pool] = arrivals["down1.relu2"];
        return { ...values, dx: total.image, skip: skip.d, pool: pool.d, both: total["down1.relu2"] };"""
    found = computed(explorer, body, dlogits)
    lines = every_line(double, network_input(image))
    assert [*found][: len(lines)] == [*lines]
    for name, expected in lines.items():
        assert_same(found[name], expected)
    logits, cache = double.forward(lines["image"], training=False)
    assert_same(found["head"], logits)
    dx, _ = double.backward(dlogits, cache)
    assert_same(found["dx"], dx)
    _, dskip, _ = double.ups[0].backward(double.head.backward(dlogits, cache.head)[0], cache.ups[0])
    assert_same(found["skip"], dskip)
    assert_same(found["skip"] + found["pool"], found["both"])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_other_images_have_the_committed_logits(explorer, data, k):
    body = """const image = EXPLORER_DATA.images[a[0]];
        return { logits: unetForward(EXPLORER_DATA.config.widths, ARRAYS, normalizedPixels(image)).at(-1).y };"""
    assert_same(computed(explorer, body, k)["logits"], exporter.decode(data["images"][k]["logits"])[None])


def test_the_gradient_of_a_number_inside_the_network(explorer, data, net):
    """Of one value of bottleneck.norm2, which no line of minunet's backward begins at: by central differences."""
    double = map_arrays(net, lambda array: array.astype("float64"))
    x = network_input(data["images"][0])
    body = """const [x] = a; const lines = unetForward(EXPLORER_DATA.config.widths, ARRAYS, x);
        const { y } = lines.find(({ name }) => name === "bottleneck.norm2"); const dy = zeros(y.shape);
        dy.data[(8 * 16 + 7) * 32 + 5] = 1;
        return { dx: unetBackward(lines, "bottleneck.norm2", dy).total.image };"""
    dx = computed(explorer, body, x)["dx"]
    direction = np.random.default_rng(6).standard_normal(x.shape)
    ahead, behind = (every_line(double, x + h * direction)["bottleneck.norm2"][0, 8, 7, 5] for h in (1e-7, -1e-7))
    assert (dx * direction).sum() == pytest.approx((ahead - behind) / 2e-7, rel=1e-5, abs=0)
    assert dx.any()


def test_receptive_fields_are_those_of_the_summary(explorer, net):
    """Of the four rows in the middle, after which the pattern repeats, the one that sees most."""
    body = """const names = state.lines.map(({ name }) => name); const result = {};
        for (const { name, y } of state.lines.slice(1)) {
          const middle = y.shape[1] / 2;
          result[name] = Math.max(...[0, 1, 2, 3].map((k) => {
            const [first, last] = unetSeen(state.lines, name, [middle + k, middle + k]).image;
            return last - first + 1;
          }));
        }
        return result;"""
    expected = {row.name: row.receptive_field for row in summary(net, 64, 64).rows if "dropout" not in row.name}
    assert computed(explorer, body) == expected


# --- the pages --------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """The addresses in a page."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src")]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_of_the_repository(name):
    links = Links((FOLDER / f"{name}.html").read_text(encoding="utf-8")).found
    assert len(links) > 3
    assert [link for link in links if not link.startswith("data:") and not (FOLDER / link).is_file()] == []


NAMELESS = """() => {
  const labelled = (element) => [...(element.labels || [])].some((label) => label.textContent.trim());
  const named = (element) =>
    element.getAttribute("aria-label") || element.textContent.trim() || element.title || labelled(element);
  const usable = [...document.querySelectorAll("a, button, select, input, [tabindex]")];
  return usable.filter((element) => !named(element)).map((element) => element.outerHTML);
}"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_in_silence_fits_the_screen_and_names_what_can_be_used(opened, name):
    page = opened(name)
    assert page.title().endswith("minunet")
    for details in page.query_selector_all("summary"):
        details.click()
    if name == "dice":
        page.select_option("#preset", "one large, one empty")
    if name == "explorer":  # the longest name, the most channels
        page.select_option("#line", "bottleneck.relu1")
        page.wait_for_function("byId('channels').children.length === 32")
    for viewport in (WIDE, NARROW):
        page.set_viewport_size(viewport)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        widths = page.locator("canvas[tabindex]").evaluate_all("all => all.map((c) => c.getBoundingClientRect().width)")
        assert all(width > 120 for width in widths)  # what one paints on, a finger must hit
    assert page.evaluate(NAMELESS) == []
    assert page.locator("[aria-labelledby=questions] li").count() == (0 if name == "index" else 3)
    assert page.faults == []


@pytest.mark.parametrize("name", ["dice", "explorer"])
def test_pictures_follow_the_readers_light_and_dark(opened, name):
    page = opened(name)
    canvas = "[data-map=bce]" if name == "dice" else "#heat"
    corner = f"() => [...document.querySelector('{canvas}').getContext('2d').getImageData(0, 0, 1, 1).data]"
    page.wait_for_function(f"document.querySelector('{canvas}').width > 200")
    assert min(page.evaluate(corner)) > 200
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"Math.max(...({corner})().slice(0, 3)) < 80")


def numbers(text):
    """The numbers in a text, with its typographer's minus."""
    return [float(found) for found in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text.replace("−", "-"))]


def shown(page, grid):
    """The numbers in a grid of convolution.html, row by row."""
    return [numbers(text)[0] for text in page.locator(f"{grid} .cell").all_text_contents() if numbers(text)]


@pytest.fixture(scope="module")
def convolution(opened):
    return opened("convolution", reduced_motion="reduce")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["same", 0, 1])
def test_convolution_shows_minunets_numbers(convolution, stride, padding):
    page = convolution
    page.check(f"input[name=stride][value='{stride}']")
    page.check(f"input[name=padding][value='{padding}']")
    page.select_option("#image", "a slope")
    page.select_option("#kernel", "sharpen")
    page.fill("#bias", "2")
    page.select_option("#gradient", "y itself (loss = ½ Σ y²)")
    page.click("#first")
    assert "No tap" in page.inner_text("#tap")
    page.click("#play")  # at once: the reader wants no motion
    x = np.add.outer(np.arange(6.0), np.arange(6.0)).reshape(1, 6, 6, 1)
    weight = np.array([0.0, -1, 0, -1, 5, -1, 0, -1, 0]).reshape(3, 3, 1, 1)
    y, cache = ops.conv2d_forward(x, weight, np.full(1, 2.0), stride, padding)
    dx, dweight, dbias = ops.conv2d_backward(y, cache)
    assert shown(page, "#y") == y.ravel().tolist()
    assert shown(page, "#dy") == y.ravel().tolist()
    assert shown(page, "#dweight") == dweight.ravel().tolist()
    assert numbers(page.inner_text("#tap"))[-1] == dbias.item()
    labels = page.locator("#dx .cell").evaluate_all("cells => cells.map((cell) => cell.ariaLabel)")
    found = [numbers(label) for label in labels if label.startswith("row")]  # the others are padding
    assert found == [[i, j, dx[0, i, j, 0]] for i in range(6) for j in range(6)]
    assert page.faults == []


def test_convolution_by_the_keys_alone(opened):
    page = opened("convolution")
    page.focus("input[name=tool]:checked")
    page.keyboard.press("Tab")  # the value to paint
    page.keyboard.press("Tab")  # the image, one tab stop
    assert page.evaluate("document.activeElement.closest('.grid').id") == "x"
    for _ in range(4):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("state.window") == [3, 1]  # the window's middle is on row 4, column 2 of the padded image
    assert page.inner_text("#sum").startswith("y[3, 1] = ")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # the focus is seen
    page.check("input[name=tool][value=paint]")
    page.fill("#brush", "-5")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    x = np.where(np.add.outer([0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]) == 2, 9.0, 1.0)
    x[3, 1] = -5
    assert page.evaluate("[...state.x.data]") == x.ravel().tolist()
    weight = np.array([-1.0, 0, 1, -2, 0, 2, -1, 0, 1]).reshape(3, 3, 1, 1)
    y, _ = ops.conv2d_forward(x.reshape(1, 6, 6, 1), weight, None)
    assert shown(page, "#y") == y.ravel().tolist()
    page.focus("#dy .cell[tabindex='0']")
    page.keyboard.press("Enter")
    assert page.evaluate("state.dy.data[0]") == 1
    page.focus("#first")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("state.taps") == 1
    assert page.faults == []


def test_dragging_and_touching(opened):
    page = opened("convolution", NARROW, has_touch=True)
    page.locator("#x .cell[data-i='5'][data-j='6']").tap()
    assert page.evaluate("state.window") == [4, 5]
    page.locator("#dy").scroll_into_view_if_needed()
    first, last = (page.locator(f"#dy .cell[data-i='{i}'][data-j='0']").bounding_box() for i in (0, 5))
    page.mouse.move(first["x"] + 9, first["y"] + 9)
    page.mouse.down()
    page.mouse.move(last["x"] + 9, last["y"] + 9, steps=20)
    page.mouse.up()
    assert page.evaluate("[0, 1, 2, 3, 4, 5].map((i) => state.dy.data[6 * i])") == [1] * 6
    page = opened("dice", NARROW, has_touch=True)
    box = page.locator("[data-map=target]").bounding_box()
    page.locator("[data-map=target]").tap(position={"x": 0.5 / 16 * box["width"], "y": 0.5 / 16 * box["height"]})
    assert page.evaluate("[...state.target.data.slice(0, 3)]") == [1, 1, 0]


def test_dice_shows_minunets_numbers(opened):
    page = opened("dice")
    for preset in page.locator("#preset option").all_text_contents():
        page.select_option("#preset", preset)
        for over in ("batch", "image"):
            page.check(f"input[name=over][value={over}]")
            page.locator("#smooth").fill("-10")  # a power of ten: 0.1
            images = page.evaluate("state.images")
            logits, target = (
                np.array(page.evaluate(f"[...state.{name}.data]"), float).reshape(images, 16, 16, 1)
                for name in ("logits", "target")
            )
            table = [numbers(row) for row in page.locator("#losses td").all_text_contents()]
            losses, largest = (np.array([row[0] for row in table[k::2]]) for k in (0, 1))
            p, _ = ops.sigmoid_forward(logits)
            dice_value, dice_cache = dice_loss_forward(p, target, 0.1, over)
            bce_value, bce_cache = bce_with_logits_forward(logits, target)
            _, sum_cache = segmentation_loss_forward(logits, target, smooth=0.1, over=over)
            _, alone_cache = segmentation_loss_forward(logits, target, bce_weight=0.0, smooth=0.1, over=over)
            gradients = [dice_loss_backward(dice_cache), segmentation_loss_backward(alone_cache)]
            gradients += [bce_with_logits_backward(bce_cache), segmentation_loss_backward(sum_cache)]
            expected = np.array([dice_value, dice_value, bce_value, dice_value + bce_value])
            np.testing.assert_allclose(losses, expected, atol=5.1e-5)  # as many digits as are shown
            np.testing.assert_allclose(largest, [np.abs(g).max() for g in gradients], rtol=0.051, atol=1e-12)
            scores = [numbers(row) for row in page.locator("#scores td").all_text_contents()]
            counts = count(p > 0.5, target > 0.5)
            np.testing.assert_allclose([s[0] for s in scores[1:3]], [dice(counts), iou(counts)], atol=5.1e-5)
            assert scores[3] == [counts.tp, counts.fp, counts.fn]
    assert page.faults == []


def test_dice_by_the_keys_alone(opened):
    page = opened("dice")
    page.select_option("#preset", "nothing there, unsure")
    page.focus("[data-map=target]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    target = np.array(page.evaluate("[...state.target.data]")).reshape(16, 16)
    assert target.sum() == 5  # a small cross
    assert target[7, 8] == 1
    page.keyboard.press("Space")
    assert page.evaluate("state.target.data.every((t) => t === 0)")  # a stroke that begins on the mask erases
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.map") == "prediction"
    page.keyboard.press("Space")
    assert page.evaluate("sigmoid(state.logits.data[7 * 16 + 8])") == pytest.approx(0.9)
    assert page.inner_text("#pixel").startswith("Row 7, column 8: target 0, z = 2.2, p = 0.9.")
    before = page.evaluate("compute().losses")
    page.select_option("#descend", "bce")
    page.focus("#step")
    page.keyboard.press("Enter")
    after = page.evaluate("compute().losses")
    assert after["bce"] < before["bce"]
    assert page.faults == []


def test_the_explorer_by_the_keys_alone(opened, data, net):
    page = opened("explorer")
    page.focus("#u button[title='down1.relu2']")
    page.keyboard.press("Enter")
    page.wait_for_function("byId('channels').children.length === 8")
    page.focus("#map")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowLeft")
    page.focus("#channels [aria-checked=true]")
    channel = (page.evaluate("state.channel") + 1) % 8
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"byId('map-caption').textContent.startsWith('down1.relu2, channel {channel}:')")
    i, j = page.evaluate("state.pixel")
    middle = np.argwhere(exporter.decode(data["images"][0]["mask"])[..., 0]).mean(axis=0).round().astype(int)
    assert [i, j] == [middle[0] + 1, middle[1] - 4]
    text = page.inner_text("#number")
    assert f"channel {channel} of 8, row {i}, column {j}:" in text
    assert "made from 5 × 5 pixels." in text
    double = map_arrays(net, lambda array: array.astype("float64"))
    value = every_line(double, network_input(data["images"][0]))["down1.relu2"][0, i, j, channel]
    assert numbers(text.partition(f"column {j}:")[2])[0] == pytest.approx(value, abs=5.1e-4)
    assert float(re.findall(r"at most ([\d.e-]+)\.", page.inner_text("#agreement"))[0]) < 1e-6
    page.check("input[name=seed][value=loss]")
    page.check("input[name=show][value=gradients]")
    page.wait_for_function("byId('number').textContent.includes('begins at the loss')")
    assert page.locator("#meetings tr").count() == 2
    assert page.faults == []
