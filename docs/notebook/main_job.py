# %% [markdown]
# # A U-Net finds brain tumours: the main job of minunet, step by step
#
# minunet is a U-Net written by hand in NumPy, with no autograd: every gradient is derived on a page, and checked.
# This notebook trains it, on a GPU if there is one, and shows what happens at each stage. Run the cells from the top.
#
# Without any data it draws synthetic patients, and takes some minutes on a CPU. With LGG-MRI (see the last cell) it
# trains on real slices. In a terminal, `python examples/train_lgg.py` does the same.

# %% [markdown]
# ## Settings
#
# Change what you like here, and nothing below.

# %% parameters
DATA = None  # the folder kaggle_3m of LGG-MRI, or your own in its layout; None: synthetic patients
PRESET = "quick"  # "quick" for synthetic patients, "small" for LGG-MRI, "best" for LGG-MRI on a GPU
EPOCHS = None  # None: as many as the preset has
IMAGE_SIZE = None  # pixels; None: the preset's
PATIENTS = 24  # synthetic ones
SOURCE = None  # where pip finds minunet, if this notebook does not lie in a clone of it: git+https://...

# %% [markdown]
# ## Install, and look for a GPU
#
# A hosted service gives you an empty machine: minunet is installed from the clone that this notebook lies in, or from
# `SOURCE`. Where there is an NVIDIA GPU, CuPy is installed too, unless it is there already.

# %%
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path


def missing(module):
    """Whether a module cannot be imported."""
    return importlib.util.find_spec(module) is None


def install(source):
    """Pip-install minunet, with CuPy for the CUDA version that the driver speaks, if there is one."""
    extra = ""
    if shutil.which("nvidia-smi") and missing("cupy"):
        driver = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"CUDA Version: (\d+)", driver)
        extra = "" if version is None else "[cuda13]" if int(version[1]) >= 13 else "[cuda12]"
    requirement = f"minunet{extra} @ {source}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", requirement], check=True)


if missing("minunet"):
    clones = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "minunet" / "__init__.py").is_file()]
    if not (SOURCE or clones):
        raise SystemExit("minunet is not here: run this notebook in a clone of it, or set SOURCE")
    install(SOURCE or clones[0].as_uri())
    importlib.invalidate_caches()

# %%
from minunet.base.backend import resolve_device

device, reason = resolve_device("auto")
print(f"device: {device}" + (f" ({reason})" if reason else ""))

# %%
from dataclasses import replace

import numpy as np

from minunet import AdamW, UNet, engines
from minunet.base.backend import to_device, to_numpy
from minunet.base.rng import Key
from minunet.base.run_folder import next_free_folder
from minunet.data import phantom, reader
from minunet.data.augment import augment
from minunet.data.batches import prepare_batch
from minunet.data.splits import split_by_patient
from minunet.network.layers import map_arrays
from minunet.results.overlays import ACTUAL, display_image, overlay
from minunet.results.plots import plot_samples
from minunet.results.prediction import write_png
from minunet.results.report import write_curves, write_test
from minunet.summary import summary
from minunet.training.checkpoint import load_net
from minunet.training.evaluation import predict_slices
from minunet.training.loop import TrainingData, fit
from minunet.training.presets import PRESETS
from minunet.training.step import loss_and_grads

folder = next_free_folder("runs", "notebook")  # everything that this notebook writes


def show(picture):
    """The picture under the cell; its path, where this runs as a plain script."""
    try:
        from IPython.display import Image, display
    except ModuleNotFoundError:
        print(picture)
    else:
        display(Image(filename=str(picture)))


# %% [markdown]
# ## Patients
#
# Patients are split, not slices: neighbouring slices are nearly one picture, and a network that has learned one has
# seen the other. The validation patients choose the best epoch, and the test patients are looked at once, at the end.

# %%
preset = PRESETS[PRESET]
size = IMAGE_SIZE or preset.image_size
slices = phantom.make(PATIENTS, size) if DATA is None else reader.read_folder(DATA, size)
train, validation, test = (slices.subset(places) for places in split_by_patient(slices.patients))
for name, part in {"to train": train, "to validate": validation, "to test": test}.items():
    print(f"{name:12} {len(part.patient_names()):3} patients, {len(part):4} slices")

# %% [markdown]
# ## A slice and its mask, and both augmented
#
# Each training slice is shown a little differently every time: mirrored, turned, zoomed. The mask moves with it, by
# the same draw. Look at the two columns on the right: if mask and tumour part there, nothing that follows can be
# good.

# %%
settings = preset.training
area = train.masks.sum(axis=(1, 2, 3), dtype="int64")
chosen = np.argsort(area)[-1:-13:-4]  # three slices with much tumour
images, masks = augment(train.images[chosen].astype("float32"), train.masks[chosen], settings.augmentation, Key(seed=1))
titles = [f"{train.patients[place]}\nslice {train.numbers[place]}" for place in chosen]
show(plot_samples(folder / "samples.png", train.images[chosen], train.masks[chosen], images, masks, titles))

# %% [markdown]
# ## A batch
#
# What a training step takes: the slices of several patients, each normalised by the mean and spread of its own
# volume, augmented, on the device. Channels stand last.

# %%
statistics = preset.normalization.statistics(train)
places = np.random.default_rng(0).choice(len(train), size=settings.batch_size, p=area / area.sum())
batch = prepare_batch(train, statistics, places, device, augmentation=settings.augmentation, key=Key(seed=2))
x, target = to_numpy(batch.x), to_numpy(batch.target)
print("x:     ", x.shape, x.dtype, f"mean {x.mean():.2f}, deviation {x.std():.2f}")
print("target:", target.shape, target.dtype, f"{100 * target.mean():.1f} % tumour")
pictures = [overlay(image, mask[..., 0], ACTUAL) for image, mask in zip(display_image(x), target, strict=True)]
strips = [np.hstack(pictures[row : row + 4]) for row in range(0, len(pictures) - len(pictures) % 4, 4)]
enlarged = max(1, 192 // size)
write_png(folder / "batch.png", np.vstack(strips).repeat(enlarged, axis=0).repeat(enlarged, axis=1))
show(folder / "batch.png")

# %% [markdown]
# ## The network
#
# Down the left side of the U, across by the skips, up the right side: shape, parameters, arithmetic and receptive
# field of each layer. [docs/shapes.md](../shapes.md) explains the columns.

# %%
net = map_arrays(UNet(**preset.model, seed=0), lambda array: to_device(array, device))
print(summary(net, size, size))

# %% [markdown]
# ## Twenty steps on one batch
#
# Forward, loss, backward, step; on a copy of the network, and always with the same batch. The loss has to fall. If it
# does not, no training will help.

# %%
from matplotlib.figure import Figure

copy = map_arrays(net, lambda array: array.copy())
optimizer = AdamW(copy.parameters(), lr=settings.lr)
losses = []
for step in range(20):
    loss, grads, _ = loss_and_grads(copy, batch.x, batch.target, settings.loss, Key(seed=3, step=step))
    optimizer.step(grads)
    losses.append(loss)
print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after 19 steps")
figure = Figure(figsize=(5, 2.5), layout="constrained")
axes = figure.subplots()
axes.plot(losses, marker=".")
axes.set(xlabel="step", ylabel="loss on one batch", ylim=(0, None), xticks=range(0, 20, 5))
figure.savefig(folder / "one_batch.png", dpi=120)
show(folder / "one_batch.png")

# %% [markdown]
# ## Training
#
# All patients, many epochs. After each one the network looks at the validation patients, and a checkpoint is written.

# %%
if EPOCHS is not None:
    settings = replace(settings, epochs=EPOCHS, warmup_epochs=min(settings.warmup_epochs, EPOCHS / 2))
preprocessing = {
    "image_size": size,
    "normalization": preset.normalization.to_dict(),
    "flip_average": preset.flip_average,
}
data = TrainingData(train, validation, preset.normalization)
with engines.build(net, settings.loss, settings.batch_size, (size, size), device) as engine:
    print(f"engine: {engine.description}")
    progress = fit(engine, data, settings, folder, metadata={"preprocessing": preprocessing})

# %% [markdown]
# ## The curves
#
# Loss and Dice of training and validation patients. Where validation stops rising and training goes on, the network
# begins to learn its patients by heart. The best epoch on the validation patients is kept.

# %%
write_curves(folder, progress.history, progress.best_epoch)
show(folder / "curves.png")

# %% [markdown]
# ## The test
#
# Patients that were neither trained on nor used to choose anything. Dice is that of each patient's whole volume:
# twice the overlap, divided by the sum of the two volumes. The table gives the same predictions under other
# definitions too, and the best threshold on brightness alone, which a network should beat.

# %%
best, _ = load_net(folder / "best.npz")
best = map_arrays(best, lambda array: to_device(array, device))
probabilities = predict_slices(best, test, preset.normalization, flip_average=preset.flip_average)
print(write_test(folder, test, probabilities, preset.normalization, checkpoint="best.npz", split="patient"))

# %% [markdown]
# Predictions beside the truth, the best patients and the worst:

# %%
show(folder / "predictions.png")

# %% [markdown]
# Each test patient's Dice, and the interval of the mean:

# %%
show(folder / "per_patient.png")

# %% [markdown]
# ## And now
#
# - **Real slices.** LGG-MRI is on Kaggle (`mateuszbuda/lgg-mri-segmentation`). With an account's API token in place:
#   `pip install kaggle && kaggle datasets download mateuszbuda/lgg-mri-segmentation --unzip --path data`. Then set
#   `DATA = "data/kaggle_3m"` and `PRESET = "small"`, or `"best"` on a GPU, and run all cells again.
# - **How it works.** [The course](../index.md), from a convolution by hand to the whole backward pass.
# - **Do it yourself.** [Exercises](../exercises.md): write a backward pass, find a planted bug.
