"""Augmentation: the geometry against a loop, image and mask moved by one draw, intensities by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.base import rng
from minunet.base.rng import Key
from minunet.data.augment import (
    PLAIN,
    PRESETS,
    Augmentation,
    augment,
    change_intensity,
    draw_matrix,
)

SEEDS = st.integers(0, 2**32 - 1)


def random_images(seed, shape=(2, 7, 5, 3)):
    return np.random.default_rng(seed).standard_normal(shape)


def reflected(place, size):
    """The border pixel is its own neighbour: -1 is 0, size is size - 1, and so on there and back."""
    while not 0 <= place < size:
        place = -1 - place if place < 0 else 2 * size - 1 - place
    return place


def warp_by_loops(images, matrices, nearest):
    n, height, width, _ = images.shape
    result = np.zeros_like(images)
    for image in range(n):
        for i in range(height):
            for j in range(width):
                q = np.array([i - (height - 1) / 2, j - (width - 1) / 2])
                y, x = matrices[image] @ q + [(height - 1) / 2, (width - 1) / 2]
                if nearest:
                    corners = [(int(np.floor(y + 0.5)), int(np.floor(x + 0.5)), 1.0)]
                else:
                    top, left = int(np.floor(y)), int(np.floor(x))
                    dy, dx = y - top, x - left
                    corners = [
                        (top, left, (1 - dy) * (1 - dx)),
                        (top, left + 1, (1 - dy) * dx),
                        (top + 1, left, dy * (1 - dx)),
                        (top + 1, left + 1, dy * dx),
                    ]
                for row, column, weight in corners:
                    result[image, i, j] += weight * images[image, reflected(row, height), reflected(column, width)]
    return result


@given(seed=SEEDS, height=st.integers(1, 7), width=st.integers(1, 7), nearest=st.booleans())
def test_warps_match_a_loop_over_pixels(seed, height, width, nearest):
    images = random_images(seed, (2, height, width, 2))
    matrices = np.random.default_rng(seed + 1).normal(0, 1.5, (2, 2, 2))
    expected = warp_by_loops(images, matrices, nearest)
    moved = PLAIN.warp(images, images, matrices)[nearest]
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-7 * np.abs(images).max())


def test_float32_is_interpolated_in_float32():
    """Bit for bit as it is written here, which is what the CUDA engine's kernel computes."""
    image, matrix = random_images(0, (5, 6)).astype("float32"), np.array([[0.9, 0.2], [-0.3, 1.1]])
    moved, _ = PLAIN.warp(image[None, :, :, None], image[None, :, :, None], matrix[None])
    for i in range(5):
        for j in range(6):
            y, x = np.round(matrix @ [i - 2, j - 2.5], 9) + np.array([2, 2.5])
            top, left = int(np.floor(y)), int(np.floor(x))
            dy, dx = np.float32(y - top), np.float32(x - left)
            (a, b), (c, d) = (
                [image[reflected(row, 5), reflected(column, 6)] for column in (left, left + 1)]
                for row in (top, top + 1)
            )
            assert moved[0, i, j, 0] == (1 - dy) * ((1 - dx) * a + dx * b) + dy * ((1 - dx) * c + dx * d)


def test_a_quarter_turn_hits_the_pixels():
    images = random_images(0, (1, 6, 6, 2))
    cos, sin = np.cos(np.pi / 2), np.sin(np.pi / 2)  # cos is 6e-17
    for quarter in ([[0.0, 1.0], [-1.0, 0.0]], [[cos, sin], [-sin, cos]]):
        for moved in PLAIN.warp(images, images, np.array([quarter])):
            np.testing.assert_array_equal(moved[0], np.rot90(images[0]))


@pytest.mark.parametrize(
    ("augmentation", "axis"), [(Augmentation(flip_vertical=1), 1), (Augmentation(flip_horizontal=1), 2)]
)
def test_a_flip_reverses_rows_or_columns_of_image_and_mask(augmentation, axis):
    images = random_images(1)
    masks = (images[..., :1] > 0).astype("float32")
    new_images, new_masks = augment(images, masks, augmentation, Key(0))
    np.testing.assert_array_equal(new_images, np.flip(images, axis))
    np.testing.assert_array_equal(new_masks, np.flip(masks, axis))


@pytest.mark.parametrize("preset", ["reference", "mild"])
@given(seed=SEEDS)
def test_image_and_mask_move_by_one_draw(preset, seed):
    """An image that is its own mask: where linear interpolation sees one value only, the mask has that value."""
    masks = (random_images(seed, (2, 12, 12, 1)) > 0).astype("float64")
    images, moved = augment(masks, masks, PRESETS[preset], Key(seed))
    clear = (images == 0) | (images == 1)
    np.testing.assert_array_equal(images[clear], moved[clear])
    assert set(np.unique(moved)) <= {0.0, 1.0}


@given(seed=SEEDS)
def test_masks_stay_if_told_so(seed):
    images = random_images(seed, (2, 8, 8, 3))
    masks = (images[..., :1] > 0).astype("float32")
    augmentation = Augmentation(rotation=45.0, zoom=0.2)
    moved_images, same_masks = augment(images, masks, augmentation, Key(seed), move_masks=False)
    expected, _ = augment(images, masks, augmentation, Key(seed))
    np.testing.assert_array_equal(same_masks, masks)
    assert not np.shares_memory(same_masks, masks)
    np.testing.assert_array_equal(moved_images, expected)
    assert not np.array_equal(moved_images, images)


def test_nothing_asked_means_copies():
    images, masks = random_images(2), random_images(3)
    new_images, new_masks = augment(images, masks, Augmentation(), Key(0))
    for old, new in ((images, new_images), (masks, new_masks)):
        np.testing.assert_array_equal(old, new)
        assert not np.shares_memory(old, new)


@given(seed=SEEDS)
def test_an_image_is_drawn_by_its_own_key_whatever_the_batch(seed):
    images, masks = random_images(seed).astype("float32"), random_images(seed + 1)[..., :1]
    key = Key(seed=seed % 1000, epoch=2, step=5)
    together = augment(images, masks, PRESETS["strong"], key)
    alone = [augment(images[n : n + 1], masks[n : n + 1], PRESETS["strong"], key._replace(image=n)) for n in (0, 1)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert together[0].dtype == np.float32


def test_the_draws_are_those_of_the_stream_of_augmentation():
    images, key = random_images(0), Key(seed=7, epoch=1, step=2, image=3)
    matrices = [draw_matrix(PRESETS["mild"], rng.generator(Key(7, 1, 2, rng.AUGMENT, 3 + n))) for n in (0, 1)]
    expected, _ = PLAIN.warp(images, images, np.stack(matrices))
    np.testing.assert_array_equal(augment(images, images, PRESETS["mild"], key)[0], expected)


@pytest.mark.parametrize("n", range(6))
def test_a_matrix_is_made_of_its_draws_in_their_order(n):
    draws = rng.generator(Key(0, image=n))
    vertical, horizontal = draws.random(2)
    angle = np.radians(30 * draws.uniform(-1, 1))
    row_growth, column_growth = 1 + 0.2 * draws.uniform(-1, 1, size=2)
    flip = np.diag([-1 if vertical < 0.25 else 1, -1 if horizontal < 0.5 else 1])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    augmentation = Augmentation(flip_horizontal=0.5, flip_vertical=0.25, rotation=30.0, zoom=0.2)
    matrix = draw_matrix(augmentation, rng.generator(Key(0, image=n)))
    expected = flip @ rotation @ np.diag([1 / row_growth, 1 / column_growth])
    np.testing.assert_allclose(matrix, expected, rtol=1e-14)


def test_drawn_matrices_have_the_asked_ranges():
    augmentation = Augmentation(flip_horizontal=0.5, flip_vertical=0.25, rotation=30.0, zoom=0.2)
    draws = [draw_matrix(augmentation, rng.generator(Key(0, image=n))) for n in range(2000)]
    inverse = np.linalg.inv(draws)  # growth times rotation times flip, from input to output
    growth = np.linalg.norm(inverse, axis=2)
    assert 0.8 <= growth.min() < 0.81
    assert 1.19 < growth.max() <= 1.2
    flipped_x, flipped_y = inverse[:, 1, 1] < 0, inverse[:, 0, 0] < 0  # 30 degrees keep the sign of the diagonal
    assert abs(flipped_x.mean() - 0.5) < 5 * np.sqrt(0.25 / 2000)
    assert abs(flipped_y.mean() - 0.25) < 5 * np.sqrt(0.1875 / 2000)
    angle = np.degrees(np.arctan2(np.abs(inverse[:, 0, 1]), np.abs(inverse[:, 0, 0])))
    assert 29 < angle.max() <= 30
    assert abs(angle.mean() - 15) < 1  # the size of an angle is uniform in [0, 30]


def test_growing_shows_a_smaller_part():
    """A spot in the middle of the image gets larger where the drawn factor is above 1."""
    image = np.zeros((1, 21, 21, 1))
    image[:, 8:13, 8:13] = 1
    for n in range(20):
        matrix = draw_matrix(Augmentation(zoom=0.5), rng.generator(Key(0, image=n)))
        area = PLAIN.warp(image, image, matrix[None])[1].sum()
        factor = np.linalg.det(np.linalg.inv(matrix))
        assert (area > 25) == (factor > 1) or abs(factor - 1) < 0.25


def test_leaving_one_part_out_does_not_change_the_others():
    full = draw_matrix(Augmentation(rotation=20.0, zoom=0.1), rng.generator(Key(4)))
    turned = draw_matrix(Augmentation(rotation=20.0), rng.generator(Key(4)))
    angle = np.arctan2(turned[1, 0], turned[0, 0])
    assert np.arctan2(full[1, 0], full[0, 0]) == pytest.approx(angle, abs=1e-12)


def intensity(images, seed=0, **amounts):
    generators = [rng.generator(Key(seed, image=n)) for n in range(len(images))]
    return change_intensity(images, Augmentation(**amounts), generators, Key(seed, step=1, image=3))


def test_brightness_adds_one_number_to_all_pixels():
    images = random_images(0)
    change = intensity(images, brightness=0.4) - images
    assert np.ptp(change, axis=(1, 2, 3)).max() < 1e-12
    assert (np.abs(change) <= 0.4).all()
    assert not np.isclose(change[0, 0, 0, 0], change[1, 0, 0, 0])


def test_contrast_keeps_each_mean_and_stretches_the_rest():
    images = random_images(1)
    changed = intensity(images, contrast=0.5)
    np.testing.assert_allclose(changed.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=1e-12)
    factor = changed.std(axis=(1, 2)) / images.std(axis=(1, 2))
    np.testing.assert_allclose(factor, factor[:, :1] * np.ones(3))
    assert ((factor >= 0.5) & (factor <= 1.5)).all()


def test_gamma_bends_between_the_ends():
    images = random_images(2)
    changed = intensity(images, gamma=0.5)
    for end in (np.min, np.max):
        np.testing.assert_allclose(end(changed, axis=(1, 2)), end(images, axis=(1, 2)), atol=1e-12)
    low, extent = images[0].min(axis=(0, 1)), np.ptp(images[0], axis=(0, 1))
    before, after = ((x[0] - low) / extent for x in (images, changed))
    inside = (before > 0.01) & (before < 0.99)
    exponents = np.log(after[inside]) / np.log(before[inside])
    assert np.ptp(exponents) < 1e-6
    assert 0.5 <= exponents[0] <= 1.5
    assert abs(exponents[0] - 1) > 0.01


def test_gamma_leaves_a_constant_image():
    images = np.full((1, 4, 4, 3), 2.5)
    np.testing.assert_array_equal(intensity(images, gamma=0.5), images)


def test_blur_takes_from_a_pixel_what_it_gives_to_its_neighbours():
    images = np.zeros((1, 7, 7, 1))
    images[0, 3, 3] = 1
    blurred = intensity(images, blur=0.8)[0, :, :, 0]
    centre = np.sqrt(blurred[3, 3])  # the product of the same share along both axes
    share = 1 - centre
    line = np.array([0, 0, share / 2, centre, share / 2, 0, 0])
    np.testing.assert_allclose(blurred, np.outer(line, line), atol=1e-12)
    assert 0 < share <= 0.4
    constant = np.full((1, 5, 5, 2), 3.0)
    np.testing.assert_allclose(intensity(constant, blur=0.8), constant, rtol=1e-12)


def test_noise_is_normal_and_as_strong_as_asked():
    """The numbers of image n are those of its key; each image gets as much of them as is said."""
    images, key = random_images(0, (3, 5, 7, 2)), Key(1, epoch=2, step=3, stream=rng.AUGMENT, image=4)
    strength = np.array([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1)
    noisy = PLAIN.add_noise(images, strength, key)
    for n in range(3):
        numbers = rng.standard_normal(Key(1, 2, 3, rng.NOISE, 4 + n), 70).reshape(5, 7, 2)
        np.testing.assert_array_equal(noisy[n], images[n] + n * numbers.astype("float64"))
    assert PLAIN.add_noise(images.astype("float32"), strength.astype("float32"), key).dtype == np.float32


def test_noise_has_the_drawn_strength():
    images = np.zeros((20, 40, 40, 1))
    strength = intensity(images, noise=0.5).std(axis=(1, 2, 3))
    assert (strength <= 0.55).all()
    assert 0.15 < strength.mean() < 0.35
    assert len(np.unique(strength)) == 20


@pytest.mark.parametrize("seed", range(4))
def test_intensities_are_made_of_their_draws_in_their_order(seed):
    images = 0.1 * random_images(seed, (2, 6, 5, 3))  # the range of an image is below 1
    changed = intensity(images, seed, gamma=0.5, contrast=0.4, brightness=0.3, blur=0.6, noise=0.2)
    for n, x in enumerate(images):
        draws = rng.generator(Key(seed, image=n))
        gamma, contrast, brightness, blur, noise = (draws.uniform(-1, 1) for _ in range(5))
        low, extent = x.min(axis=(0, 1)), np.ptp(x, axis=(0, 1))
        x = ((x - low) / extent) ** (1 + 0.5 * gamma) * extent + low
        mean = x.mean(axis=(0, 1))
        x = (x - mean) * (1 + 0.4 * contrast) + mean + 0.3 * brightness
        share = abs(0.6 * blur)  # half of it to the pixel before, half of it to the pixel after
        for axis, size in enumerate(x.shape[:2]):
            before = x.take(np.maximum(np.arange(size) - 1, 0), axis)
            after = x.take(np.minimum(np.arange(size) + 1, size - 1), axis)
            x = (1 - share / 2) * x + share / 4 * (before + after)
        numbers = rng.standard_normal(Key(seed, step=1, stream=rng.NOISE, image=3 + n), x.size).reshape(x.shape)
        x = x + abs(0.2 * noise) * numbers.astype("float64")
        np.testing.assert_allclose(changed[n], x, rtol=0, atol=1e-13)


# The largest amount that is accepted, and the smallest that is not.
LIMITS = {
    **dict.fromkeys(("flip_horizontal", "flip_vertical", "blur"), (1.0, 1.001)),
    **dict.fromkeys(("zoom", "contrast", "gamma"), (0.999, 1.0)),
    **dict.fromkeys(("rotation", "brightness", "noise"), (1e300, float("inf"))),
}


@pytest.mark.parametrize("name", LIMITS)
def test_amounts_out_of_range_are_refused(name):
    largest, too_large = LIMITS[name]
    for value in (-0.001, too_large, float("nan")):
        with pytest.raises(ValueError, match=f"^{name} must be .*got {value}"):
            Augmentation(**{name: value})
    for value in (0.0, largest):
        assert getattr(Augmentation(**{name: value}), name) == value


def test_presets():
    assert PRESETS["none"] == Augmentation()
    reference = PRESETS["reference"]
    assert (reference.flip_horizontal, reference.flip_vertical, reference.rotation, reference.zoom) == (
        0.5,
        0.5,
        72,
        0.2,
    )
    mild = PRESETS["mild"]
    assert mild == Augmentation(flip_horizontal=0.5, rotation=15, zoom=0.1)
    strong = {"brightness": 0.3, "contrast": 0.25, "gamma": 0.3, "noise": 0.1, "blur": 0.5}
    assert PRESETS["strong"] == Augmentation(flip_horizontal=0.5, rotation=15, zoom=0.2, **strong)
