"""The reference's two flaws, measured on masks alone: no network is trained, so the figures are there in seconds.

    python benchmarks/flaws.py                     on synthetic patients
    python benchmarks/flaws.py --data kaggle_3m    on LGG-MRI

**A mask that is not augmented.** The image is moved, its mask stays. A network that finds the tumour of the moved image
to the pixel is then scored against a mask that lies elsewhere. What it gets in training is the Dice of moved and
unmoved mask.

**A split by slice.** Copy the mask of the nearest slice of the same patient that is in the training set, and do not
look at the image at all. What this gets on the test slices is what a network may get by remembering.

Both Dice are pooled over all pixels, as the reference's is.
"""

import argparse

import numpy as np

from minunet.base.rng import Key
from minunet.data import phantom, reader
from minunet.data.augment import PRESETS, augment
from minunet.data.slices import SliceSet
from minunet.data.splits import split_by_slice
from minunet.training import metrics


def unmoved_mask_dice(slices: SliceSet, augmentation: str) -> float:
    """The Dice of a perfect prediction of the moved images, against masks that were left where they were."""
    counts = metrics.Counts(0, 0, 0, 0)
    for start in range(0, len(slices), 64):  # a few at a time: the moved copies need memory
        masks = slices.masks[start : start + 64]
        _, moved = augment(masks.astype("float32"), masks, PRESETS[augmentation], Key(seed=0, image=start))
        counts = counts + metrics.count(moved, masks)
    return float(metrics.dice(counts))


def copied_mask_dice(slices: SliceSet) -> float:
    """The Dice of the nearest training slice's mask, on the test slices of a split by slice."""
    split, owner = split_by_slice(len(slices), seed=0), slices.patient_indices()
    neighbours = []
    for test in split.test:
        same = split.train[owner[split.train] == owner[test]]
        neighbours.append(same[np.abs(same - test).argmin()])
    return float(metrics.dice(metrics.count(slices.masks[neighbours], slices.masks[split.test])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder kaggle_3m; left out: synthetic patients")
    parser.add_argument("--size", type=int, default=96, help="height and width in pixels (default 96)")
    options = parser.parse_args()
    slices = reader.read_folder(options.data, options.size) if options.data else phantom.make(size=options.size)
    print(f"{len(slices)} slices of {len(slices.patient_names())} patients, {options.size} x {options.size} pixels")
    for name in ("mild", "reference"):
        dice = unmoved_mask_dice(slices, name)
        print(f"mask not augmented, augmentation {name}: {dice:.3f} in training, for a perfect prediction")
    print(f"split by slice: {copied_mask_dice(slices):.3f} on the test slices, by copying a neighbour's mask")


if __name__ == "__main__":
    main()
