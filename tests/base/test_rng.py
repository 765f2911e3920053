"""The random numbers are a function of the key: held against Philox written down a second time, in whole numbers."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.base import rng
from minunet.base.rng import Key, generator, random_uint16, standard_normal

WORD = 2**64
words = st.integers(0, WORD - 1)


def philox_4x64_10(counter, key):
    """Salmon et al. 2011, section 3.3: ten rounds of two wide products, whose halves are swapped and mixed."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2E7470EE14C6C93, WORD)
        high1, low1 = divmod(c2 * 0xCA5A826395121157, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return [c0, c1, c2, c3]


def test_this_philox_is_philox():
    """A known answer that its authors published with Random123 (kat_vectors, philox4x64 10, all zeros)."""
    answer = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox_4x64_10([0, 0, 0, 0], [0, 0]) == answer


@given(key=st.builds(Key, words, words, words, words, words), size=st.integers(0, 40))
def test_random_uint16_is_philox_of_the_key(key, size):
    """Block b, from 1, has the counter (b, image, step, epoch) and the key (seed, stream)."""
    lanes = []
    for block in range(1, size // 16 + 2):
        for word in philox_4x64_10([block, key.image, key.step, key.epoch], [key.seed, key.stream]):
            lanes += [(word >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
    drawn = random_uint16(key, size)
    assert drawn.dtype == np.uint16
    assert drawn.tolist() == lanes[:size]


def test_frozen_values():
    """Saved checkpoints resume on these numbers, and a CUDA engine draws the same."""
    assert random_uint16(Key(seed=0), 4).tolist() == [55451, 2276, 47716, 756]
    key = Key(seed=1, epoch=2, step=3, stream=4, image=5)
    assert generator(key).integers(1000, size=4).tolist() == [612, 836, 985, 974]


def test_a_shorter_draw_is_the_beginning_of_a_longer_one():
    assert random_uint16(Key(seed=3), 1000)[:37].tolist() == random_uint16(Key(seed=3), 37).tolist()


def test_every_field_counts():
    key = Key(seed=1, epoch=2, step=3, stream=4, image=5)
    draws = [tuple(random_uint16(key._replace(**change), 8)) for change in ({}, *({f: 9} for f in Key._fields))]
    assert len(set(draws)) == len(draws)


def test_two_generators_of_a_key_draw_the_same():
    key = Key(seed=7, stream=rng.AUGMENT)
    assert generator(key).standard_normal(5).tolist() == generator(key).standard_normal(5).tolist()


def test_the_lanes_are_uniform():
    draws = random_uint16(Key(seed=0, stream=rng.DROPOUT), 2**18)
    expected = 2**18 / 16
    counts = np.bincount(draws >> 12, minlength=16)
    # Pearson's chi-squared with 15 degrees of freedom: 44.3 is exceeded once in 10,000.
    assert ((counts - expected) ** 2 / expected).sum() < 44.3


# --- Normal numbers ---------------------------------------------------------------------------------------------------


@given(key=st.builds(Key, words, words, words, words, words), size=st.integers(0, 40))
def test_standard_normal_is_box_and_muller_of_the_words(key, size):
    """In float64, of the same words: number e is half of what word e // 2 gives."""
    expected = []
    for block in range(1, size // 8 + 2):
        for word in philox_4x64_10([block, key.image, key.step, key.epoch], [key.seed, key.stream]):
            u, angle = (word % 2**32 + 0.5) / 2**32, 2 * np.pi * (word >> 32) / 2**32
            radius = np.sqrt(-2 * np.log(u))
            expected += [radius * np.cos(angle), radius * np.sin(angle)]
    drawn = standard_normal(key, size)
    assert drawn.dtype == np.float32
    assert drawn.shape == (size,)
    # u has 24 bits in float32: where it is near 1, that is seen in the radius, which is near 0.
    np.testing.assert_allclose(drawn, expected[:size], rtol=0, atol=4e-4)
    large = np.hypot(*np.reshape(expected, (-1, 2)).T).repeat(2)[:size] > 0.5
    np.testing.assert_allclose(drawn[large], np.array(expected[:size])[large], rtol=0, atol=2e-6)


def test_the_ends_of_the_words_give_finite_numbers(monkeypatch):
    """The smallest u gives the largest number; u that rounds to 1 gives 0."""

    class Words:
        def random_raw(self, count):
            return np.array([0, 2**32 - 1, 2**64 - 1, 2**63], dtype=np.uint64)[:count]

    monkeypatch.setattr(rng, "philox", lambda key: Words())
    drawn = standard_normal(Key(0), 8).astype("float64")
    largest = np.sqrt(-2 * np.log(0.5 / 2**32))
    np.testing.assert_allclose(drawn, [largest, 0, 0, 0, 0, 0, -largest, 0], rtol=1e-6, atol=1e-6)


def test_the_numbers_are_normal():
    """Moments, tails, and no link between the numbers of a pair, of 4 million; bounds of 5 standard deviations."""
    count = 2**22
    x = standard_normal(Key(seed=3, stream=rng.NOISE), count).astype("float64")
    # The variance of the mean of x^k is (E x^2k - (E x^k)^2) / count, with E x^2 .. x^8 = 1, 3, 15, 105.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - mean) < 5 * np.sqrt(variance / count)
    for bound, share in ((1, 0.3173105), (2, 0.0455003), (3, 0.0026998), (4, 6.3342e-5)):
        assert abs((np.abs(x) > bound).mean() - share) < 5 * np.sqrt(share / count)
    first, second = x[::2], x[1::2]
    for link in (first * second, (first**2 - 1) * (second**2 - 1) / 2, first[1:] * second[:-1]):
        assert abs(link.mean()) < 5 / np.sqrt(len(link))
    # Evenly spread over what the distribution function of the normal makes of 16 equal parts.
    edges = [NormalDist().inv_cdf(part / 16) for part in range(1, 16)]
    counts = np.bincount(np.searchsorted(edges, x), minlength=16)
    assert ((counts - count / 16) ** 2 / (count / 16)).sum() < 44.3  # chi-squared as above


def test_a_shorter_draw_of_normal_numbers_is_the_beginning_of_a_longer_one():
    key = Key(seed=3, stream=rng.NOISE)
    np.testing.assert_array_equal(standard_normal(key, 1000)[:37], standard_normal(key, 37))


def test_the_streams_differ():
    streams = [rng.INITIALIZE, rng.SAMPLE, rng.AUGMENT, rng.PHANTOM, rng.BOOTSTRAP, rng.NOISE, rng.DROPOUT]
    assert len(set(streams)) == len(streams)
    assert max(streams) == rng.DROPOUT  # DROPOUT + k for layer k


@pytest.mark.parametrize("field", Key._fields)
@pytest.mark.parametrize("value", [-1, WORD])
def test_refuses_a_field_that_is_no_64_bit_word(field, value):
    key = Key(seed=0)._replace(**{field: value})
    with pytest.raises(ValueError, match=rf"^key\.{field} must be in \[0, 2\*\*64\), got {value}"):
        random_uint16(key, 1)
