"""Train the small U-Net of explorer.html on synthetic patients, and write it down as JavaScript::

    python docs/interactive/export_explorer.py

writes ``docs/interactive/explorer_data.js``: the weights, four slices of patients that the network has not seen, and
the logits that minunet computes for them in float64. The page runs the same network by its own formulas (ops.js,
unet.js) and shows how far its logits are from these. It takes about three minutes of one core.

Everything is drawn by key, so the same machine writes the same bits each time. Another BLAS sums in another order: the
last bits of the weights then differ, and the file agrees with itself all the same.
"""

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from minunet import AdamW, SegmentationLoss, UNet
from minunet.base import cli, rng
from minunet.base.backend import Array
from minunet.base.durable import write_text
from minunet.data import phantom
from minunet.data.batches import epoch_order, prepare_batch
from minunet.data.normalize import Normalization, apply
from minunet.data.slices import SliceSet
from minunet.network.layers import map_arrays
from minunet.training.metrics import count, dice
from minunet.training.optim import warmup_cosine
from minunet.training.step import train_step

SIZE = 64  # pixels: large enough to see a head, small enough to run in a browser while one moves the mouse
BATCH = 8
NORMALIZATION = Normalization("volume")
HERE = Path(__file__).resolve().parent


def train(patients: int = 40, epochs: int = 16) -> UNet:
    """A U-Net of two levels, trained on ``patients`` synthetic patients of seed 0."""
    net = UNet(widths=(8, 16, 32), dropout=0.0, up_kernel=2, head_kernel=1, conv_bias=False)
    slices = phantom.make(patients, SIZE, seed=0)
    statistics = NORMALIZATION.statistics(slices)
    optimizer, loss = AdamW(net.parameters(), lr=1e-2, weight_decay=0.01), SegmentationLoss()
    steps = len(slices) // BATCH
    for epoch in range(epochs):
        order = epoch_order(slices, "tumour", steps * BATCH, rng.Key(0, epoch=epoch))
        losses = []
        for step in range(steps):
            indices = order[step * BATCH : (step + 1) * BATCH]
            batch = prepare_batch(slices, statistics, indices, "cpu")
            lr = warmup_cosine(epoch * steps + step, epochs * steps, 1e-2, steps // 2)
            key = rng.Key(0, epoch=epoch, step=step)
            options: dict[str, Any] = {"lr": lr, "clip_norm": 1.0, "batch_norm_momentum": 0.9}
            value, _ = train_step(net, optimizer, batch.x, batch.target, loss, key, **options)
            losses.append(value)
        print(f"epoch {epoch + 1:2} of {epochs}: mean loss {np.mean(losses):.3f}", flush=True)
    return net


def choose(slices: SliceSet) -> dict[str, int]:
    """Four slices worth looking at, by what they show: a name, and the number of the slice."""
    area = slices.masks.sum(axis=(1, 2, 3), dtype=np.int64)
    largest, second = area.argsort()[::-1][0], None
    for place in area.argsort()[::-1]:
        if slices.patients[place] != slices.patients[largest]:
            second = place
            break
    assert second is not None  # there are several patients
    small = np.where(area >= 12, area, area.max()).argmin()
    # No tumour, and yet bright in FLAIR: fat, caps of the ventricles, harmless spots.
    inside = slices.images[:, SIZE // 4 : -SIZE // 4, SIZE // 4 : -SIZE // 4, 1].mean(axis=(1, 2))
    empty = np.where(area == 0, inside, 0).argmax()
    return {
        "a large tumour": int(largest),
        "another patient": int(second),
        "a small one": int(small),
        "none": int(empty),
    }


def export(net: UNet, patients: int = 8) -> dict[str, Any]:
    """What the page needs: the network's configuration and arrays, and four slices of ``patients`` of seed 1."""
    double = map_arrays(net, lambda array: array.astype("float64"))
    slices = phantom.make(patients, SIZE, seed=1)
    statistics, patient = NORMALIZATION.statistics(slices), slices.patient_indices()
    images = []
    for name, place in choose(slices).items():
        row = statistics.take(patient[[place]])
        x = apply(slices.images[[place]], row, "float64")
        logits, _ = double.forward(x, training=False)
        images.append(
            {
                "name": name,
                "source": slices.files[place],
                "normalization": {field: values[0].tolist() for field, values in row._asdict().items()},
                "pixels": encode(slices.images[place]),
                "mask": encode(slices.masks[place]),
                "logits": encode(logits[0]),
            }
        )
    config = {key: net.config[key] for key in ("in_channels", "out_channels", "widths", "up_kernel", "head_kernel")}
    arrays = {name: encode(array) for name, array in (net.parameters() | net.buffers()).items()}
    return {"config": config, "arrays": arrays, "images": images}


def encode(array: Array) -> dict[str, Any]:
    """An array as JSON: its shape, its dtype and its bytes, little-endian, in base64."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def decode(stored: dict[str, Any]) -> np.ndarray:
    """The array that :func:`encode` wrote."""
    values = np.frombuffer(base64.b64decode(stored["base64"]), np.dtype(stored["dtype"]).newbyteorder("<"))
    return values.reshape(stored["shape"]).astype(stored["dtype"])


HEAD = "// Written by docs/interactive/export_explorer.py: not for editing.\nconst EXPLORER_DATA = "


def to_javascript(data: dict[str, Any]) -> str:
    """The file's text: one array a line, so that a change can be seen."""
    return HEAD + json.dumps(data, separators=(",", ":")).replace('"},', '"},\n') + ";\n"


def from_javascript(text: str) -> dict[str, Any]:
    """What :func:`to_javascript` wrote."""
    return json.loads(text.removeprefix(HEAD).rstrip().removesuffix(";"))


def unseen_dice(net: UNet, patients: int = 8) -> float:
    """The mean 3-D Dice over ``patients`` that the network has not seen, of seed 1."""
    slices = phantom.make(patients, SIZE, seed=1)
    x = apply(slices.images, NORMALIZATION.statistics(slices).take(slices.patient_indices()))
    counts = [
        count(net.predict(x[slices.patient_indices() == p]) > 0.5, slices.masks[slices.patient_indices() == p])
        for p in range(patients)
    ]
    return float(np.mean([dice(c) for c in counts]))


def main(arguments: list[str]) -> None:
    """Train, export, and say what came out."""
    parser = cli.Parser(prog="python docs/interactive/export_explorer.py", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "explorer_data.js", help="the file to write")
    options: argparse.Namespace = parser.parse_args(arguments)
    net = train()
    text = to_javascript(export(net))
    write_text(options.output, text)
    print(f"Dice of 8 patients it has not seen: {unseen_dice(net):.3f}")
    print(f"{options.output}: {len(text) / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(cli.run(main))
