"""The main job once more, straight down the page: every figure of the commands has to equal this one's.

The network and its gradients, and how an image is turned, are minunet's: other tests hold them. All that lies around
them is written here anew, with nothing of ``minunet.training`` or ``minunet.results``, and little of ``minunet.data``:
reading, resizing, normalisation, the split, which slices a step takes, the schedule, clipping, the optimiser, the
average of the weights, the two curves, the best epoch, the threshold, and the scores at both sizes.
"""

import csv
import hashlib
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from minunet.base import rng
from minunet.data import phantom
from minunet.data.augment import PRESETS, augment
from minunet.network.unet import UNet
from tests.command_line import run

SIZE, ROWS = 16, 13  # images of 20 x 24 pixels: the longer side becomes 16, 13 rows are the image, 3 are padding
EPOCHS, BATCH, IMAGES = 3, 8, 30
FOLD, SEED, RATE = 1, 41, 0.015  # a rate so large that the second epoch is better than the third
# In float32 rounding grows a thousandfold in twelve steps: AdamW follows the sign of a small gradient.
IN_FLOAT64 = """
from functools import partial
from minunet.commands import train
from minunet.data import batches
train.UNet = partial(train.UNet, dtype="float64")
batches.apply = partial(batches.apply, dtype="float64")
"""
MODEL = {
    "dtype": "float64",
    "widths": (16, 32, 64, 128, 256),
    "dropout": 0.0,
    "up_kernel": 2,
    "head_kernel": 1,
    "conv_bias": False,
}


# ------------------------------------------------------------------------------------------ the oracle


def read(folder):
    """The slices of a folder: patients by name, their slices by number, at their own size and at the network's."""
    found = []
    for path in folder.glob("*/*_mask.tif"):
        name, number = re.fullmatch(r"(.+)_\d{8}_(\d+)_mask", path.stem).groups()
        found.append((name, int(number), path.with_name(path.name.replace("_mask", "")), path))
    found.sort()
    images, masks, x, t = [], [], [], []
    for _, _, image_path, mask_path in found:
        image, mask = np.asarray(Image.open(image_path)), np.asarray(Image.open(mask_path)) > 127
        bands = [Image.fromarray(image[..., c]).resize((SIZE, ROWS), Image.Resampling.BILINEAR) for c in range(3)]
        # Each pixel in 13 x 2 pieces, of which 20 x 3 make a new pixel: it is 1 if half of them are.
        pieces = mask.repeat(ROWS, axis=0).repeat(2, axis=1).reshape(ROWS, 20, SIZE, 3)
        images.append(image)
        masks.append(mask)
        x.append(np.pad(np.stack(bands, axis=-1), ((0, SIZE - ROWS), (0, 0), (0, 0)), mode="edge"))
        half = (2 * pieces.sum(axis=(1, 3)) >= 20 * 3).astype("float32")
        t.append(np.pad(half, ((0, SIZE - ROWS), (0, 0)))[..., None])
    x, owners = np.array(x), np.array([name for name, *_ in found])
    normalised = np.empty(x.shape)
    for name in set(owners):
        volume = x[owners == name].astype(float)
        low, high = np.percentile(volume[:, :ROWS], (10, 99), axis=(0, 1, 2))
        clipped = np.clip(volume[:, :ROWS], low, high)
        mean, std = clipped.mean(axis=(0, 1, 2)), clipped.std(axis=(0, 1, 2))
        normalised[owners == name] = (np.clip(volume, low, high) - mean) / std
    files = [path.name for _, _, path, _ in found]
    return SimpleNamespace(owners=owners, x=normalised, t=np.array(t), masks=np.array(masks), files=files)


def part_of(name):
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    if number % 5 == FOLD:
        return "test"
    return "validation" if number // 5 % 10**6 / 10**6 < 1 / 8 else "train"


def part(data, which):
    rows = np.array([part_of(name) == which for name in data.owners])
    return SimpleNamespace(owners=data.owners[rows], x=data.x[rows], t=data.t[rows], masks=data.masks[rows])


def sigmoid(z):
    e = np.exp(-abs(z))
    return np.where(z > 0, 1, e) / (1 + e)


def loss_of(z, t):
    """Dice with smooth 1 over the batch plus cross entropy, and the gradient of the logits."""
    p = sigmoid(z)
    total = p.sum() + t.sum() + 1
    dice = (2 * (p * t).sum() + 1) / total
    entropy = np.maximum(z, 0) - z * t + np.log1p(np.exp(-abs(z)))
    return 1 - dice + entropy.mean(), (dice - 2 * t) / total * p * (1 - p) + (p - t) / z.size


def dices(found, t, owners):
    """The 3-D Dice of each patient, by name."""
    overlap, total = found & (t > 0), found.astype(int) + (t > 0)
    return {
        name: 2 * overlap[owners == name].sum() / total[owners == name].sum() if total[owners == name].any() else 1.0
        for name in sorted(set(owners))
    }


def curves(net, data, rows=None):
    """Loss and mean Dice of ``net``, inferring."""
    rows = np.arange(len(data.t)) if rows is None else rows
    rows = rows[rng.generator(rng.Key(0, stream=rng.SAMPLE)).permutation(len(rows))]
    loss, logits = 0.0, []
    for batch in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
        z, _ = net.forward(data.x[batch], training=False)
        loss += loss_of(z, data.t[batch])[0] * len(batch)
        logits.append(z)
    found = np.concatenate(logits) > 0
    found[:, ROWS:] = False
    return loss / len(rows), np.mean(list(dices(found, data.t[rows], data.owners[rows]).values()))


def train(data):
    """The history, and the network of the best epoch."""
    net, twin = (UNet(**MODEL, seed=SEED) for _ in range(2))
    weights, state = net.parameters(), net.parameters() | net.buffers()
    m, v = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    average = {name: array.copy() for name, array in state.items()}
    training, validation = part(data, "train"), part(data, "validation")

    names = sorted(set(training.owners))
    area = training.t.sum(axis=(1, 2, 3), dtype=float)
    share = np.empty(len(area))
    for name in names:
        mine = training.owners == name
        weight = area[mine] + max(area[mine].mean() / 2, 1)
        share[mine] = weight / weight.sum() / len(names)
    # The training curve looks at about as many slices as the validation's, in whole patients.
    seen = max(1, min(len(names), round(len(names) * len(validation.t) / len(area))))
    sample = np.array(names)[np.linspace(0, len(names) - 1, seen).round().astype(int)]
    sample = np.flatnonzero(np.isin(training.owners, sample))

    steps, t = math.ceil(IMAGES / BATCH), 0
    warmup = round(2 / 16 * EPOCHS * steps)
    history, best = [], None
    for epoch in range(EPOCHS):
        order = rng.generator(rng.Key(SEED, epoch=epoch, stream=rng.SAMPLE)).choice(len(area), IMAGES, p=share)
        losses = []
        for step in range(steps):
            rate = RATE * (1 + math.cos(math.pi * (t - warmup) / (EPOCHS * steps - warmup))) / 2
            if t < warmup:
                rate = RATE * (t + 1) / warmup
            t += 1
            rows, key = order[step * BATCH : (step + 1) * BATCH], rng.Key(SEED, epoch=epoch, step=step)
            x, target = augment(training.x[rows], training.t[rows], PRESETS["mild"], key)
            z, cache = net.forward(x, training=True, key=key)
            loss, dz = loss_of(z, target)
            losses.append(loss)
            _, grads = net.backward(dz, cache)
            norm = math.sqrt(sum((g.astype(float) ** 2).sum() for g in grads.values()))
            for name, w in weights.items():
                g = grads[name] * min(1, 1 / norm)
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g * g
                w -= rate * (0.01 if name.endswith("weight") else 0) * w
                w -= rate * (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-7)
            for name, array in net.batch_stats(cache).items():
                state[name][...] = 0.9 * state[name] + 0.1 * array
            decay = min(0.998, (1 + t) / (10 + t))
            for name, array in state.items():
                average[name] = decay * average[name] + (1 - decay) * array
        for name, array in (twin.parameters() | twin.buffers()).items():
            array[...] = average[name]
        (validation_loss, validation_dice), (_, train_dice) = curves(twin, validation), curves(twin, training, sample)
        row = epoch + 1, rate, np.mean(losses), validation_loss, train_dice, validation_dice
        history.append(row)
        if best is None or validation_dice > best[0]:
            best = validation_dice, {name: array.copy() for name, array in average.items()}
    for name, array in (twin.parameters() | twin.buffers()).items():
        array[...] = best[1][name]
    return np.array(history), twin


def predict(net, x):
    """The probabilities of the network's pixels, and of the files' pixels: each with its mirror image, averaged."""
    logits = (net.forward(x, training=False)[0], net.forward(x[:, :, ::-1], training=False)[0][:, :, ::-1])
    p = (sum(map(sigmoid, logits)) / 2).astype("float32")
    p[:, ROWS:] = 0
    bands = [Image.fromarray(np.ascontiguousarray(band, "float32")) for band in p[:, :ROWS, :, 0]]
    own = [np.asarray(band.resize((24, 20), Image.Resampling.BILINEAR)) for band in bands]
    return p[..., 0], np.array(own)


# ------------------------------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Patients of 20 x 24 pixels, and the run of ``train`` on them."""
    folder = tmp_path_factory.mktemp("oracle")
    slices = phantom.make(patients=30, size=24, seed=3)
    slices = slices.subset([i for i, number in enumerate(slices.numbers) if number % 4 == 0])
    phantom.write_kaggle(folder / "data", replace(slices, images=slices.images[:, 2:22], masks=slices.masks[:, 2:22]))
    flags = {"epochs": EPOCHS, "images-per-epoch": IMAGES, "fold": FOLD, "seed": SEED, "learning-rate": RATE}
    flags |= {"data": "data", "preset": "small", "image-size": SIZE, "engine": "plain", "output": "run"}
    ended = run(
        "train_lgg", *(f"--{name}={value}" for name, value in flags.items()), "--quiet", cwd=folder, before=IN_FLOAT64
    )
    assert (ended.code, ended.err) == (0, "")
    return folder


@pytest.fixture(scope="module")
def data(place):
    return read(place / "data")


@pytest.fixture(scope="module")
def trained(data):
    return train(data)


def near(value):
    return pytest.approx(value, rel=1e-9)


def test_the_history(place, trained):
    with (place / "run" / "history.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["epoch", "learning_rate", "train_loss", "validation_loss", "train_dice", "validation_dice"]
    found = np.array(rows[1:], float)
    np.testing.assert_allclose(found, trained[0], rtol=1e-9)
    assert found[:, 5].argmax() == 1  # neither the first nor the last


def test_the_parts(place, data):
    patients = json.loads((place / "run" / "config.json").read_text())["patients"]
    assert patients == {
        which: sorted({name for name in data.owners if part_of(name) == which})
        for which in ("train", "validation", "test")
    }


def test_the_test_table(place, data, trained):
    test, scores = part(data, "test"), json.loads((place / "run" / "metrics.json").read_text())
    small, own = predict(trained[1], test.x)
    for found, t, entry in ((small, test.t[..., 0], "test"), (own, test.masks, "test_at_own_size")):
        check_scores(scores[entry], found > 0.5, t, test.owners)


def check_scores(scores, found, t, owners):
    by_patient = dices(found, t, owners)
    of_patients = scores["per_patient"]
    assert dict(zip(of_patients["names"], of_patients["dice"], strict=True)) == near(by_patient)
    assert of_patients["summary"]["dice"]["mean"] == near(np.mean(list(by_patient.values())))
    assert scores["pooled"]["dice"] == near(2 * (found & (t > 0)).sum() / (found.sum() + (t > 0).sum()))


def test_evaluate(place, data, trained):
    """On all patients, each image at its own size."""
    ended = run("evaluate", "run/best.npz", "data", "--output", "scores", cwd=place)
    assert (ended.code, ended.err) == (0, "")
    found = predict(trained[1], data.x)[1] > 0.5
    check_scores(json.loads((place / "scores" / "metrics.json").read_text())["test"], found, data.masks, data.owners)
    with (place / "scores" / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"].split("/")[-1] for row in rows] == data.files
    assert [row["group"] for row in rows] == data.owners.tolist()
    assert [int(row["pixels_marked"]) for row in rows] == data.masks.sum(axis=(1, 2)).tolist()
    assert [int(row["pixels_found"]) for row in rows] == found.sum(axis=(1, 2)).tolist()


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_predict(place, data, trained, threshold):
    """One patient's images, whose masks are as large as they are."""
    name = data.owners[0]
    (folder,) = (place / "data").glob(f"{name}_*")
    images = sorted(path for path in folder.iterdir() if "_mask" not in path.name)
    (place / "images").mkdir(exist_ok=True)
    for path in images:
        (place / "images" / path.name).write_bytes(path.read_bytes())
    output = f"masks {threshold}"
    ended = run("predict", "run/best.npz", "images", "--threshold", threshold, "--output", output, cwd=place)
    assert (ended.code, ended.err) == (0, "")
    mine = data.owners == name
    expected = predict(trained[1], data.x[mine])[1] > threshold
    for file, mask in zip(np.array(data.files)[mine], expected, strict=True):
        found = np.asarray(Image.open(place / output / file.replace(".tif", "_mask.png")))
        assert set(np.unique(found)) <= {0, 255}
        assert ((found > 0) == mask).all()
