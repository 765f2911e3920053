"""The pictures of docs/figures build, and the numbers in them are minunet's."""

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from docs.figures import (
    backward_graph,
    conv2d,
    conv_transpose2d,
    feature_maps,
    gradient_flow_skip,
    gradient_norms,
    loss_surface,
    receptive_field,
    style,
    trained,
    unet_shapes,
)
from docs.figures.__main__ import NAMES, PICTURES, build, main
from minunet import SegmentationLoss, UNet
from minunet.base.errors import UserError
from minunet.gradcheck import check_layer
from minunet.network.layers import map_arrays
from minunet.ops import conv2d_backward, conv2d_forward, conv_transpose2d_forward
from minunet.summary import summary

FIGURES = Path(style.__file__).parent


def texts(figure):
    """All that is written in a figure."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


# ---- They build ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_builds_and_writes_its_numbers(tmp_path, name):
    lines = build(name, tmp_path, tiny=True)
    assert (tmp_path / f"{name}.txt").read_text(encoding="utf-8").splitlines()[2:] == lines
    assert re.search(r"\d", "".join(lines))
    with Image.open(tmp_path / f"{name}.png", formats=["PNG"]) as picture:
        assert picture.width in (style.WIDTH * style.DPI, style.WIDTH * style.COARSE_DPI)


def test_the_same_command_draws_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        build("conv2d", tmp_path / folder)
        trained.network.cache_clear()
        build("predictions_over_epochs", tmp_path / folder, tiny=True)
    for name in ("conv2d.gif", "conv2d.png", "predictions_over_epochs.png", "predictions_over_epochs.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_file_that_draws_is_in_the_list():
    helpers = {"__init__", "__main__", "style", "trained"}
    assert {path.stem for path in FIGURES.glob("*.py")} - helpers == set(NAMES)


def test_the_command(tmp_path, capsys):
    main(["unet_shapes", "--tiny", "--out", str(tmp_path)])
    assert capsys.readouterr().out.startswith("== unet_shapes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet_shapes.png", "unet_shapes.txt"]
    with pytest.raises(UserError, match="unet_shape: no such picture, choose from conv2d"):
        main(["unet_shape"])


# ---- What is in docs/pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_pictures_are_there_and_small(name):
    assert (PICTURES / f"{name}.txt").read_text(encoding="utf-8").startswith(f"python -m docs.figures {name}\n")
    assert 5_000 < (PICTURES / f"{name}.png").stat().st_size < 300_000
    if name in ("conv2d", "conv_transpose2d"):
        assert 20_000 < (PICTURES / f"{name}.gif").stat().st_size < 1_000_000
        with Image.open(PICTURES / f"{name}.gif", formats=["GIF"]) as animation:
            assert (animation.width, animation.n_frames) == (style.WIDTH * style.COARSE_DPI, 8)


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "unet_shapes", "backward_graph", "loss_surface"])
def test_the_numbers_in_docs_pictures_are_those_of_today(tmp_path, name):
    """Of the pictures that need no training and no rounding beyond the digits that they show."""
    build(name, tmp_path)
    assert (tmp_path / f"{name}.txt").read_text(encoding="utf-8") == (PICTURES / f"{name}.txt").read_text(
        encoding="utf-8"
    )


# ---- The numbers are minunet's ---------------------------------------------------------------------------------------


def test_conv2d_writes_what_the_op_computes():
    x, weight, dy = (a.reshape(1, *a.shape, 1) for a in (conv2d.X, conv2d.WEIGHT, conv2d.DY))
    y, cache = conv2d_forward(x, weight[0, :, :, :, None], None, padding=0)
    dx, dweight, _ = conv2d_backward(dy, cache)
    with matplotlib.rc_context(style.RC):
        written = texts(conv2d.draw_still())
    grids = [text for text in written if re.fullmatch(r"−?\d+", text)]
    expected = [*x.ravel(), *weight.ravel(), *y.ravel(), *dx.ravel(), *dweight.ravel(), *dy.ravel()]
    assert grids == [style.number(value) for value in expected]
    # A sum that is written out gives what it says: 1·1 + 2·2 = 5.
    sums = [text.split(" = ")[1:] for text in written if text.count(" = ") == 2]
    assert len(sums) == 10
    for terms, total in sums:
        assert sum(np.prod([float(f) for f in term.split("·")]) for term in terms.split(" + ")) == float(total)


def test_the_animation_of_conv2d_ends_with_the_whole_backward():
    whole, last = texts(conv2d.draw_still()), texts(conv2d.draw(4, "backward"))
    numbers = [[text for text in found if re.fullmatch(r"−?\d+", text)] for found in (whole, last)]
    assert numbers[0] == numbers[1]
    assert len(texts(conv2d.draw(1, "forward"))) < len(texts(conv2d.draw(4, "forward")))


def test_conv_transpose2d_writes_what_the_op_computes():
    result = conv_transpose2d.compute()
    x, weight = conv_transpose2d.X[None, :, :, None], conv_transpose2d.WEIGHT[:, :, None, None]
    y, _ = conv_transpose2d_forward(x, weight, None)
    np.testing.assert_array_equal(result.full[:4, :4], y[0, :, :, 0])
    written = texts(conv_transpose2d.draw_still())
    grids = [text for text in written if re.fullmatch(r"−?\d+", text)]
    arrays = (x, weight, result.full, result.dx, result.dweight, conv_transpose2d.dfull())
    assert grids == [style.number(value) for a in arrays for value in a.ravel()]
    sums = [text.split(" = ")[1:] for text in written if text.count(" = ") == 2]
    assert len(sums) == 5
    for terms, total in sums:
        factors = [[float(f.strip("()").replace("−", "-")) for f in term.split("·")] for term in terms.split(" + ")]
        assert sum(np.prod(f) for f in factors) == float(total)


def test_unet_shapes_totals_are_the_summarys():
    net = UNet()
    table = summary(net, 224, 224)
    assert table.parameters == sum(array.size for array in net.parameters().values())
    rooms = unet_shapes.rooms(table)
    assert sum(room.parameters for room in rooms) == table.parameters
    assert sum(room.activation_bytes for room in rooms) == table.activation_bytes
    written = " ".join(texts(unet_shapes.draw(table)))
    assert f"{table.parameters:,} parameters; {table.activation_bytes / 1e6:.1f} MB" in written
    assert f"{table.receptive_field} x {table.receptive_field} pixels" in written
    assert f"{table.flops / 1e9:.2f} GFLOP" in written
    skip = next(row for row in table.rows if row.name == "down1.relu2")
    assert f"{skip.activation_bytes / 1e6:.1f} MB" in written


def test_backward_graph_numbers_every_op_and_adds_at_the_skips():
    calls = backward_graph.compute()
    written = texts(backward_graph.draw(calls))
    assert sorted(int(t) for t in written if t.isdigit()) == list(range(1, len(calls) + 1))
    assert len(calls) == 41
    by_place = {(call.room, call.name): call for call in calls}
    for level in (1, 2):
        _, dskip = by_place[f"up{level}", "concat"].results
        below = by_place[f"down{level}", "pool"].results[0]
        np.testing.assert_array_equal(by_place[f"down{level}", "relu2"].dy, dskip + below)


def test_gradient_flow_shows_a_split_and_a_sum():
    found = gradient_flow_skip.compute()
    np.testing.assert_array_equal(found.dup, found.dconcat_up)
    np.testing.assert_array_equal(found.dskip, found.dconcat_skip)
    np.testing.assert_array_equal(found.total, found.dskip + found.dpool)
    rows, columns, channel = gradient_flow_skip.crop(found)
    shown = found.total[0, rows, columns, channel] / gradient_flow_skip.UNIT
    written = texts(gradient_flow_skip.draw(found))
    assert {f"{value:.0f}".replace("-", "−") for value in shown.ravel()} <= set(written)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("skips", [True, False])
def test_the_variants_of_gradient_norms_have_right_gradients(norm, skips):
    net = gradient_norms.build_net((2, 3, 4), norm, skips)
    net = map_arrays(net, lambda array: array.astype("float64"))
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
    few = {"exhaustive": 0, "samples": 2, "directions": 1}
    assert check_layer(net, x, training=True, sampling=few).ok(1e-12)
    names = net.parameters().keys()
    assert any("norm" in name for name in names) == norm
    assert net.ups[0].convs.conv1.weight.shape[2] == (4 if skips else 2)


def test_loss_surface_slopes_are_the_derivatives_of_its_values():
    for loss in loss_surface.LOSSES.values():
        for tumour in (0, 10):
            place = loss_surface.at(loss, 0.3, -2.0, tumour)
            slopes = []
            for dz, dw in ((1e-5, 0), (0, 1e-5)):
                high = loss_surface.at(loss, 0.3 + dz, -2.0 + dw, tumour).loss
                low = loss_surface.at(loss, 0.3 - dz, -2.0 - dw, tumour).loss
                slopes.append((high - low) / 2e-5)
            scale = max(abs(slope) for slope in slopes)
            assert np.abs(np.array([place.dz, place.dw]) - slopes).max() / scale < 1e-6
    both = SegmentationLoss(dice_weight=1, bce_weight=1, smooth=1)
    parts = [loss_surface.at(loss, 0.3, -2.0).loss for loss in loss_surface.LOSSES.values()]
    assert loss_surface.at(both, 0.3, -2.0).loss == pytest.approx(sum(parts), rel=1e-12)


@pytest.mark.parametrize("widths", [(2,), (2, 2), (2, 2, 2)])
@pytest.mark.parametrize(("up_kernel", "head_kernel"), [(2, 1), (3, 3)])
def test_receptive_field_by_gradient_is_that_of_the_summary(widths, up_kernel, head_kernel):
    net = UNet(widths=widths, dropout=0.0, up_kernel=up_kernel, head_kernel=head_kernel)
    measured = max(receptive_field.extent(rows) for rows in receptive_field.field_by_gradient(net))
    assert measured == receptive_field.field_by_theory(net)


def test_feature_maps_are_those_of_forward():
    net = UNet(widths=(2, 3, 4), dropout=0.0)
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 3), "float32")
    found = feature_maps.activations(net, x)
    logits, _ = net.forward(x, training=False)
    np.testing.assert_array_equal(found["logits"], logits)
    assert [values.shape[1:] for values in found.values()] == [
        (8, 8, 2), (4, 4, 3), (2, 2, 4), (4, 4, 3), (8, 8, 2), (8, 8, 1),
    ]  # fmt: skip
