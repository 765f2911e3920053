"""Lab smeared: augmented training makes the network worse.

Each slice is mirrored or not, and turned by quarters, so that the network sees it in eight ways. That should help.
With this function it predicts blurred patches beside the tumours. Run this file and see (it draws smeared.png); then
mend it, keeping the names of the functions.

    python FILE                                  shows the symptom
    python -m minunet.exercises smeared FILE     says whether you have found the cause
    python -m minunet.exercises smeared --hint 1 (then 2, 3)
"""

import numpy as np

from minunet.base.backend import Array


def augment(images: Array, masks: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Each square image (N, H, H, C) and its mask (N, H, H, 1), mirrored or not, and turned by quarters."""
    augmented_images, augmented_masks = [], []
    for image, mask in zip(images, masks, strict=True):
        if generator.random() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        quarters = int(generator.integers(4))
        image = np.rot90(image, quarters, axes=(0, 1))
        augmented_images.append(image)
        augmented_masks.append(mask)
    return np.stack(augmented_images), np.stack(augmented_masks)


def main() -> None:
    """Show the symptom: the share of bright pixels that the mask calls tumour, and four pairs."""
    from minunet.data import phantom
    from minunet.results.plots import plot_samples

    volumes = [phantom.make_patient(seed=0, patient=patient, size=64) for patient in range(4)]
    largest = [int(masks.sum(axis=(1, 2, 3)).argmax()) for _, masks in volumes]
    images = np.stack([volume[0][i] for volume, i in zip(volumes, largest, strict=True)])
    masks = np.stack([volume[1][i] for volume, i in zip(volumes, largest, strict=True)])
    new_images, new_masks = augment(images, masks, np.random.default_rng(0))
    print("FLAIR (channel 1) inside of the mask, mean grey value:")
    print(f"  before augmentation  {images[..., 1][masks[..., 0] == 1].mean():.0f}")
    print(f"  after                {new_images[..., 1][new_masks[..., 0] == 1].mean():.0f}")
    titles = [f"phantom {n + 1}" for n in range(4)]
    print("pairs of image and mask:", plot_samples("smeared.png", images, masks, new_images, new_masks, titles))


if __name__ == "__main__":
    main()
