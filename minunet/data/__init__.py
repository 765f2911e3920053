"""Data: slices of MR volumes with their masks, from files or drawn by the package itself.

In reading order:

1. ``slices``     ``SliceSet``, what every other module passes around: images, masks, and whose they are
2. ``images``     one image file: found, opened with care, decoded, resized
3. ``lgg``        reads the folders of the Kaggle data set "lgg-mri-segmentation", and others laid out like them
4. ``normalize``  grey values to network inputs, by statistics that are kept with the model
5. ``phantom``    draws synthetic patients: the data that the examples use when they are given none
6. ``splits``     who is trained on, who chooses the best epoch, who is tested on: by patient
7. ``manifest``   finds files that have changed; ``verify``: what is wrong with a data set, and what is unusual
8. ``augment``    one random draw turns, zooms and flips an image and its mask alike
9. ``batches``    which slices meet in a batch

Pillow is imported when a file is read or written; nothing else needs more than NumPy.
"""

from minunet.data.slices import SliceSet

__all__ = ["SliceSet"]
