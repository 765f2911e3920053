"""Lab smeared: the image is turned, and its mask stays where it was."""

import numpy as np

from minunet.exercises.exercise import Exercise, NotYet, require_equal
from minunet.exercises.learner import Learner
from minunet.exercises.starters import smeared as starter


def check(learner: Learner) -> list[str]:
    """Raise NotYet unless images are augmented as before, and each mask goes with its image."""
    rng = np.random.default_rng(0)
    masks = (rng.random((8, 5, 5, 1)) < 0.4).astype("uint8")
    images = np.concatenate([rng.standard_normal((8, 5, 5, 1)), masks], axis=3)  # channel 1 shows the tumour itself
    for seed in range(3):
        given = images.tobytes(), masks.tobytes()
        new_images, new_masks = learner.call_for("images, masks", "augment", images, masks, np.random.default_rng(seed))
        if (images.tobytes(), masks.tobytes()) != given:
            raise NotYet("augment", expected="images and masks as they were", found="other numbers in them")
        expected, _ = starter.augment(images, masks, np.random.default_rng(seed))
        without_flips = _turn(images, np.random.default_rng(seed), flip=False)
        require_equal(
            "the augmented images (they were right)",
            new_images,
            expected,
            {
                "the images are not augmented any more: that cures the symptom, and takes the use of augmentation "
                "away": (images),
                "the images are mirrored, but not turned any more: let the mask turn with them": _flip(
                    images, np.random.default_rng(seed)
                ),
                "the images are turned, but not mirrored any more": without_flips,
                "one more number is drawn for each pair: image and mask move by one and the same draw": _turn(
                    images, np.random.default_rng(seed), further_draws=1
                ),
            },
        )
        require_equal(
            "the augmented masks, beside images whose channel 1 is the mask",
            new_masks,
            expected[..., 1:].astype("uint8"),
            {
                "still the same: the image is turned, and its mask is mirrored only": _flip(
                    masks, np.random.default_rng(seed)
                ),
                "the mask is turned the other way round": _turn(masks, np.random.default_rng(seed), direction=-1),
                "the mask is turned, but not mirrored with its image any more": _turn(
                    masks, np.random.default_rng(seed), flip=False
                ),
                "the masks are not moved at all": masks,
                "the mask is turned twice": _turn(masks, np.random.default_rng(seed), direction=2),
            },
        )
    return [
        "that was the cause: the mask was mirrored with its image, but not turned with it",
        "24 masks lie where their images show the tumour, and the images are augmented as before",
    ]


def _turn(
    arrays: np.ndarray,
    generator: np.random.Generator,
    flip: bool = True,
    direction: int = 1,
    further_draws: int = 0,
) -> np.ndarray:
    """The draws of augment, of which only a part is carried out."""

    def one(array: np.ndarray) -> np.ndarray:
        mirrored = generator.random() < 0.5
        quarters = int(generator.integers(4))
        generator.integers(4, size=further_draws)
        return np.rot90(array[:, ::-1] if mirrored and flip else array, direction * quarters, axes=(0, 1))

    return np.stack([one(array) for array in arrays])


def _flip(arrays: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return _turn(arrays, generator, direction=0)


EXERCISE = Exercise(
    name="smeared",
    title="augmentation makes the network worse",
    functions=("augment",),
    hints=(
        "Look at the picture. What should image and mask have in common, whatever is done to them?",
        "Which lines change the image? Which of them change the mask?",
        "The mask is mirrored with its image, and not turned with it: np.rot90 of the mask, by the same number of "
        "quarters.",
    ),
    check=check,
)
