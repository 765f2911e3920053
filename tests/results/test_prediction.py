"""From a trained checkpoint and image files to masks: examples/predict.py and minunet.results.prediction."""

import re
import runpy
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minunet.base import cli
from minunet.base.errors import UserError
from minunet.data import phantom, reader
from minunet.data.normalize import Normalization
from minunet.engines import memory
from minunet.network.unet import UNet
from minunet.results import overlays
from minunet.results.prediction import Predictor, resize_probabilities
from minunet.training.checkpoint import load_net, save_training
from minunet.training.config import TrainingConfig
from minunet.training.evaluation import predict_slices
from minunet.training.loop import TrainingData, fit
from minunet.training.optim import AdamW
from minunet.training.step import Engine
from tests.base.processes import POSIX
from tests.command_line import BECOMES_A_PIPE, command, run

SCRIPT = Path(__file__).parents[2] / "examples" / "predict.py"
SIZE = 32


@pytest.fixture
def predict(monkeypatch):
    """``predict(*arguments)`` runs the example in this process, on one core, and returns its exit code."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    main = runpy.run_path(str(SCRIPT))["main"]
    return lambda *arguments: cli.run(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three phantoms on disk, as the Kaggle data lie there."""
    folder = tmp_path_factory.mktemp("kaggle_3m")
    phantom.write_kaggle(folder, phantom.make(patients=3, size=SIZE))
    return folder


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    """A checkpoint of a short run on those phantoms."""
    folder = tmp_path_factory.mktemp("run")
    slices = reader.read_folder(data, SIZE)
    normalization = Normalization("volume")
    config = TrainingConfig(
        epochs=2, batch_size=8, images_per_epoch=32, lr=1e-2, batch_norm_momentum=0.5, ema_decay=0.9
    )
    preprocessing = {"normalization": normalization.to_dict(), "image_size": SIZE, "flip_average": False}
    fit(
        Engine(UNet(widths=(4, 8), dropout=0.0), config.loss),
        TrainingData(slices, slices, normalization),
        config,
        folder,
        metadata={"preprocessing": preprocessing},
        progress_bar=False,
    )
    return folder / "last.npz"


def save(path, net=None, **preprocessing):
    """An untrained checkpoint with this preprocessing."""
    net = net or UNet(widths=(2, 4), dropout=0.0)
    metadata = {"preprocessing": {"flip_average": True, **preprocessing}} if preprocessing else {}
    save_training(path, net=net, optimizer=AdamW(net.parameters()), metadata=metadata)
    return path


def patient_folder(data) -> Path:
    return sorted(folder for folder in data.iterdir() if folder.is_dir())[0]


def test_a_patients_folder_gives_what_training_would_predict(predict, checkpoint, data, tmp_path, capsys):
    folder, out = patient_folder(data), tmp_path / "out"
    assert predict(checkpoint, folder, "--output", out, "--device", "cpu") == 0

    slices = reader.read_folder(data, SIZE)
    mine = slices.subset([i for i, file in enumerate(slices.files) if Path(file).parent == folder])
    net, _ = load_net(checkpoint)
    probabilities = predict_slices(net, mine, Normalization("volume"))
    expected = {Path(file).stem: p[..., 0] > 0.5 for file, p in zip(mine.files, probabilities, strict=True)}
    assert 0 < sum(mask.sum() for mask in expected.values()) < len(mine) * SIZE**2
    assert {path.name for path in out.iterdir()} == {
        f"{name}_{kind}.png" for name in expected for kind in ("mask", "overlay")
    }
    for file, image in zip(mine.files, mine.images, strict=True):
        name = Path(file).stem
        with Image.open(out / f"{name}_mask.png") as mask, Image.open(out / f"{name}_overlay.png") as shown:
            assert mask.mode == "L"
            assert (np.asarray(mask) == 255 * expected[name]).all()
            assert (np.asarray(shown) == overlays.overlay(overlays.display_image(image), expected[name])).all()
    assert len(capsys.readouterr().out.splitlines()) == len(mine)


def test_where_memory_is_short_fewer_images_are_predicted_at_a_time(checkpoint, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    with Predictor.load(checkpoint) as predictor:
        assert predictor.batch == 16
        expected = predictor.probabilities(images)
    two = memory.prediction_bytes(predictor.net, SIZE, 2)
    monkeypatch.setattr(memory, "available_bytes", lambda net: two)
    with Predictor.load(checkpoint) as predictor:
        assert predictor.batch == 2
        np.testing.assert_allclose(predictor.probabilities(images), expected, atol=1e-6)
    monkeypatch.setattr(memory, "available_bytes", lambda net: None)  # the system does not say
    assert Predictor.load(checkpoint).batch == 16


@POSIX
def test_an_image_size_beyond_the_memory_is_refused_at_once(checkpoint, tmp_path):
    """A checkpoint of a few kilobytes must not make a machine swap."""
    path = save(tmp_path / "huge.npz", normalization=Normalization("scale").to_dict(), image_size=8192)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, resource.RLIM_INFINITY))"
    ended = run("predict", path, "a.png", "--output", "out", cwd=tmp_path, before=limited)
    assert ended.code == 2
    assert re.fullmatch(
        r"error: .*huge\.npz: its images are 8192 x 8192 pixels, and to predict one takes about [\d.]+ GB "
        r"and [\d.]+ GB are free, use a machine with more memory\n",
        ended.err,
    ), ended
    assert not (tmp_path / "out").exists()


def many_classes(path, classes, image_size):
    net = UNet(widths=(2, 4), out_channels=classes, dropout=0.0)
    return save(path, net, normalization=Normalization("scale").to_dict(), image_size=image_size, flip_average=False)


def test_a_prediction_holds_one_class_of_one_image_at_a_time(tmp_path):
    """All classes of the image are 240 MB, the volume of 40 images at the network's size 39 MB."""
    path = many_classes(tmp_path / "many.npz", classes=60, image_size=64)
    Image.new("RGB", (1000, 1000)).save(tmp_path / "0.png")
    files = [tmp_path / "0.png"]
    for number in range(1, 40):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(files[-1])
    with Predictor.load(path) as predictor:
        predictor = replace(predictor, batch=4)
        prepared = predictor.prepare(files)
        expected = predictor.probabilities(prepared.images)
        tracemalloc.start()
        try:
            for number, (_, image, parts) in enumerate(predictor.volume(files, prepared)):
                for k, (place, found) in enumerate(parts):
                    wanted = resize_probabilities(expected[number, ..., k : k + 1], *image.shape[:2])
                    assert place == (slice(None), slice(None), slice(k, k + 1))
                    np.testing.assert_array_equal(found, wanted)
                assert k == 59
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 40e6, peak


@POSIX
@pytest.mark.parametrize("image_size", [16, None])
def test_masks_beyond_the_memory_are_refused_at_once(tmp_path, image_size):
    """A checkpoint of some 50 kilobytes and an image of 50 would take 32 GB."""
    path = many_classes(tmp_path / "many.npz", classes=2000, image_size=image_size)
    Image.new("RGB", (4000, 4000)).save(tmp_path / "a.png")
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, resource.RLIM_INFINITY))"
    ended = run("predict", path, "a.png", "--output", "out", "--device", "cpu", cwd=tmp_path, before=limited)
    assert ended.code == 2
    assert re.fullmatch(
        r"error: a\.png: 2000 x 4000 x 4000 pixels of prediction take about 32\.1 GB and [\d.]+ GB are free, "
        r"give fewer or smaller images or use a machine with more memory\n",
        ended.err,
    ), ended
    assert not (tmp_path / "out").exists()


def test_a_volume_beyond_the_memory_is_refused_at_once(tmp_path, monkeypatch):
    path = many_classes(tmp_path / "one.npz", classes=1, image_size=64)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with Predictor.load(path) as predictor:
        monkeypatch.setattr(memory, "host_bytes", lambda: 3 * 3 * 64**2)
        assert len(predictor.prepare([tmp_path / "a.png"] * 3).images) == 3
        with pytest.raises(UserError, match=r": 4 images of 64 x 64 pixels take about .* are free, give fewer"):
            predictor.prepare([tmp_path / "a.png"] * 4)
        monkeypatch.setattr(memory, "host_bytes", lambda: None)  # the system does not say
        assert len(predictor.prepare([tmp_path / "a.png"] * 4).images) == 4


def test_loose_images_of_any_size_and_format(predict, checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"wide äöü 1.png": (20, 70), "-odd.JPG": (51, 33), "one pixel.tiff": (1, 1), "large.tif": (200, 100)}
    for name, (height, width) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
    out = tmp_path / "a" / "b"
    assert predict(checkpoint, *(tmp_path / name for name in sizes), "--output", out, "--threshold", "0.3") == 0
    for name, (height, width) in sizes.items():
        with Image.open(out / f"{Path(name).stem}_mask.png") as mask:
            assert mask.size == (width, height)
            assert set(np.unique(mask)) <= {0, 255}
        with Image.open(out / f"{Path(name).stem}_overlay.png") as shown:
            assert shown.size == (width, height)
            assert shown.mode == "RGB"


def test_threshold_and_weights_change_the_result(predict, checkpoint, data, tmp_path):
    def area(*flags):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert predict(checkpoint, patient_folder(data), "--output", out, "--device", "cpu", *flags) == 0
        return [int(np.asarray(Image.open(path)).astype(bool).sum()) for path in sorted(out.glob("*_mask.png"))]

    plain = area()
    assert area("--weights", "ema") == plain  # auto: the file has averaged weights
    assert area("--weights", "raw") != plain
    low = area("--threshold", "0.1")
    assert all(more >= less for more, less in zip(low, plain, strict=True))
    assert low != plain


def test_each_output_channel_has_its_own_mask(predict, tmp_path):
    net = UNet(widths=(2, 4), out_channels=2, dropout=0.0)
    net.head.bias[:] = (50, -50)  # certain, everywhere: yes, no
    path = save(tmp_path / "two.npz", net, normalization=Normalization("scale").to_dict(), image_size=16)
    Image.fromarray(np.full((9, 7, 3), 100, np.uint8)).save(tmp_path / "x.png")
    assert predict(path, tmp_path / "x.png", "--output", tmp_path) == 0
    assert np.asarray(Image.open(tmp_path / "x_mask1.png")).min() == 255
    assert np.asarray(Image.open(tmp_path / "x_mask2.png")).max() == 0
    assert (tmp_path / "x_overlay2.png").exists()


def test_probabilities_keep_their_place_and_range():
    p = np.random.default_rng(0).random((8, 6, 2), dtype="float32")
    assert (resize_probabilities(p, 8, 6) == p).all()
    large, small = resize_probabilities(p, 31, 17), resize_probabilities(p, 3, 2)
    assert large.shape == (31, 17, 2)
    assert small.shape == (3, 2, 2)
    for resized in (large, small):
        assert p.min() <= resized.min() <= resized.max() <= p.max()
    corner = np.zeros((8, 8, 1), "float32")
    corner[0, 7] = 1
    place = np.unravel_index(resize_probabilities(corner, 40, 20).argmax(), (40, 20))
    assert place == (0, 19)


# ---- What people do wrong: one line, exit 2, nothing written --------------------------------------------------------


@pytest.fixture
def files(tmp_path, checkpoint):
    """Files to go wrong with."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin").mkdir()
    for name in ("good.png", "twin/good.png"):
        Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "good_mask.tif").touch()
    scale = Normalization("scale").to_dict()
    save(tmp_path / "no_preprocessing.npz")
    save(tmp_path / "other_step.npz", normalization=scale, image_size=16, crop="head")
    save(tmp_path / "bad_size.npz", normalization=scale, image_size="16")
    save(tmp_path / "odd_size.npz", normalization=scale, image_size=17)
    save(tmp_path / "bad_kind.npz", normalization={**scale, "kind": "magic"}, image_size=16)
    save(tmp_path / "bad_flip.npz", normalization=scale, image_size=16, flip_average=1)
    save(tmp_path / "plain.npz", normalization=scale, image_size=16)
    save(tmp_path / "grey.npz", UNet(in_channels=1, widths=(2,)), normalization=scale, image_size=16)
    (tmp_path / "trained.npz").write_bytes(checkpoint.read_bytes())
    overflowing, negative = UNet(widths=(2, 4)), UNet(widths=(2, 4))
    for array in overflowing.parameters().values():
        array[...] = np.random.default_rng(0).choice(np.float32([-3e38, 3e38]), array.shape)
    negative.bottleneck.norm1.running_var[...] = -1
    save(tmp_path / "overflowing.npz", overflowing, normalization=scale, image_size=16)
    save(tmp_path / "negative.npz", negative, normalization=scale, image_size=16)
    save(tmp_path / "huge_percentile.npz", normalization={**scale, "percentiles": [0, 10**400]}, image_size=16)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.npz", "good.png"), "none.npz: no such file"),
        (("text.png", "good.png"), "text.png: "),
        (("no_preprocessing.npz", "good.png"), "no_preprocessing.npz: does not say how to prepare images"),
        (("other_step.npz", "good.png"), "other_step.npz: does not say how to prepare images"),
        (("odd_size.npz", "good.png"), "image_size must be a multiple of 2 for a network of this depth, got 17"),
        (("bad_size.npz", "good.png"), "image_size must be a whole number from 1 to 8192, got '16'"),
        (("bad_kind.npz", "good.png"), "kind must be 'scale', 'volume' or 'none', got 'magic'"),
        (("overflowing.npz", "good.png"), "the network answers with values that are not numbers"),
        (("negative.npz", "good.png"), "damaged checkpoint (buffers/bottleneck.norm1.running_var is negative)"),
        (("huge_percentile.npz", "good.png"), "percentiles must be two ascending numbers in [0, 100]"),
        (("plain.npz", ""), "--images: must not be empty"),
        (("bad_flip.npz", "good.png"), "flip_average must be true or false, got 1"),
        (("grey.npz", "good.png"), "good.png: RGB of 8 bits, but the network was trained on grey of 8 bits"),
        (("plain.npz", "good.png", "--weights", "ema"), "plain.npz: holds no averaged weights"),
        (("trained.npz", "good.png", "none.png"), "none.png: no such file or folder"),
        (("trained.npz", "good.png", "empty"), "empty: no image found"),
        (("trained.npz", "good_mask.tif"), "good_mask.tif: no image found"),
        (("trained.npz", "good.png", "text.png"), "text.png: cannot be read"),
        (("trained.npz", "good.png", "twin"), "twin/good.png: named like good.png"),
        (
            ("trained.npz", "good.png", "--threshold", "1"),
            "--threshold: must be a number of at least 0 and less than 1",
        ),
        (("trained.npz",), "images"),
    ],
)
def test_mistakes_are_one_line(predict, files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    assert predict(*arguments, "--output", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(files.rglob("*")) == before


def test_nothing_is_overwritten(predict, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    Path("good_mask.png").write_bytes(b"a day's work")
    assert predict("trained.npz", "good.png", "--output", ".") == 2
    assert capsys.readouterr().err == "error: good_mask.png: is there already, choose another folder as --output\n"
    assert Path("good_mask.png").read_bytes() == b"a day's work"
    assert not Path("good_overlay.png").exists()


@POSIX
@pytest.mark.parametrize("link", ["nowhere", "good_mask.png"])
def test_a_link_that_leads_nowhere_is_there_already(predict, files, monkeypatch, capsys, link):
    monkeypatch.chdir(files)
    Path("good_mask.png").symlink_to(link)
    assert predict("trained.npz", "good.png", "--output", ".") == 2
    assert capsys.readouterr().err == "error: good_mask.png: is there already, choose another folder as --output\n"
    assert str(Path("good_mask.png").readlink()) == link
    assert not Path("good_overlay.png").exists()
    assert not Path("nowhere").exists()


# Done to each image when it has been predicted, just before its mask is written.
BEFORE_A_MASK = """
import os
from pathlib import Path
from minunet.results import prediction
def volume(self, *arguments, volume=prediction.Predictor.volume):
    for found in volume(self, *arguments):
        os.makedirs('out', exist_ok=True)
        {}
        yield found
prediction.Predictor.volume = volume
"""

APPEARS = {
    "a mask": "Path('out/good_mask.png').write_text('mine')",
    "an overlay": "Path('out/good_overlay.png').write_text('mine')",
    "a link": "os.symlink('../mine.txt', 'out/good_mask.png')",
    "a link that leads nowhere": "os.symlink('nowhere', 'out/good_mask.png')",
}


@POSIX
@pytest.mark.parametrize("name", APPEARS)
def test_a_result_that_appears_while_it_is_predicted_is_not_overwritten(files, name):
    (files / "mine.txt").write_text("mine")
    arguments = ("trained.npz", "good.png", "--output", "out", "--device", "cpu")
    ended = run("predict", *arguments, cwd=files, before=BEFORE_A_MASK.format(APPEARS[name]))
    kind = "overlay" if name == "an overlay" else "mask"
    assert ended.code == 2, ended
    assert ended.err == (
        f"error: out/good_{kind}.png: cannot be written (File exists), choose another name or folder; "
        "what was there before is unchanged\n"
    )
    assert (files / "mine.txt").read_text() == "mine"
    if "link" in name:
        assert (files / "out" / "good_mask.png").is_symlink()
        assert not (files / "out" / "nowhere").exists()
    else:
        assert (files / "out" / f"good_{kind}.png").read_text() == "mine"
    assert {path.name for path in (files / "out").iterdir()} <= {"good_mask.png", "good_overlay.png"}


OTHER_IMAGE = {
    "other pixels": "Image.new('RGB', (8, 8), (9, 9, 10)).save('twin/good.png')",
    "another size": "Image.new('RGB', (9, 8), (9, 9, 9)).save('twin/good.png')",
    "no image": "Path('twin/good.png').write_text('text')",
}


@pytest.mark.parametrize("image_size", [16, None])
@pytest.mark.parametrize("name", OTHER_IMAGE)
def test_an_image_that_is_replaced_while_it_is_predicted_gets_no_mask(files, image_size, name):
    """The second of two, replaced when the mask of the first is written: the first one's results stay."""
    save(files / "net.npz", normalization=Normalization("volume").to_dict(), image_size=image_size)
    (files / "first.png").write_bytes((files / "good.png").read_bytes())
    before = "from PIL import Image\n" + BEFORE_A_MASK.format(OTHER_IMAGE[name])
    arguments = ("net.npz", "first.png", "twin", "--output", "out", "--device", "cpu")
    ended = run("predict", *arguments, cwd=files, before=before)
    assert ended.code == 2, ended
    said = "cannot be read" if name == "no image" else "changed while it was being predicted, predict it again\n"
    assert ended.err.startswith(f"error: twin/good.png: {said}")
    assert ended.err.count("\n") == 1
    assert {path.name for path in (files / "out").iterdir()} == {"first_mask.png", "first_overlay.png"}


def test_a_file_that_is_written_anew_with_the_same_image_is_no_other(files):
    before = "from PIL import Image\n" + BEFORE_A_MASK.format(
        "Image.new('RGB', (8, 8), (9, 9, 9)).save('twin/good.png')"
    )
    (files / "first.png").write_bytes((files / "good.png").read_bytes())
    arguments = ("trained.npz", "first.png", "twin", "--output", "out", "--device", "cpu")
    ended = run("predict", *arguments, cwd=files, before=before)
    assert (ended.code, ended.err) == (0, "")


def test_of_two_predictions_into_one_folder_one_is_refused(files):
    for number in range(9):
        (files / f"x{number}.png").write_bytes((files / "good.png").read_bytes())
    images = [files / f"x{number}.png" for number in range(9)]
    processes = [
        subprocess.Popen(
            command("predict", "trained.npz", *images, "--output", "out", "--device", "cpu"),
            cwd=files,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2], errors
    assert sorted(error.count("\n") for error in errors) == [0, 1]
    assert len(list((files / "out").iterdir())) == 18


@POSIX
@pytest.mark.parametrize("name", ["trained.npz", "good.png"])
def test_a_file_that_becomes_a_pipe_when_it_is_opened_does_not_hang(files, name):
    arguments = ("trained.npz", "good.png", "--output", "out", "--device", "cpu")
    ended = run("predict", *arguments, cwd=files, before=BECOMES_A_PIPE.format(name))
    assert ended.code == 2, ended
    assert ended.err.startswith(f"error: {name}: cannot be ")
    assert "(not a regular file)" in ended.err
    assert ended.err.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_line(predict, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    assert predict("trained.npz", "good.png", "--output", "text.png/out") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_predictor_says_what_its_checkpoint_lacks(files):
    with pytest.raises(UserError, match=r"no_preprocessing\.npz: does not say"):
        Predictor.load(files / "no_preprocessing.npz")


def test_the_script_runs_by_itself(files):
    command = [sys.executable, str(SCRIPT), "trained.npz", "good.png", "--output", "out", "--device", "cpu"]
    done = subprocess.run(command, cwd=files, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out/good_mask.png: ")
    again = subprocess.run(command, cwd=files, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")


def test_the_mirror_image_is_averaged_if_the_run_did(checkpoint, data):
    predictor = Predictor.load(checkpoint)
    images = predictor.prepare(sorted(patient_folder(data).glob("*[0-9].tif"))).images
    plain, mirrored = predictor.probabilities(images), predictor.probabilities(images[:, :, ::-1].copy())
    averaged = replace(predictor, flip_average=True).probabilities(images)
    np.testing.assert_allclose(averaged, (plain + mirrored[:, :, ::-1]) / 2, rtol=1e-5)
    assert not np.allclose(averaged, plain)
