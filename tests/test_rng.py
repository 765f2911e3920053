"""The random numbers are a function of the key: held against Philox written down a second time, in whole numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet import rng
from minunet.rng import Key, generator, random_uint16

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


def test_the_streams_differ():
    assert len({rng.INITIALIZE, rng.SAMPLE, rng.AUGMENT, rng.DROPOUT}) == 4
    assert max(rng.INITIALIZE, rng.SAMPLE, rng.AUGMENT) < rng.DROPOUT  # DROPOUT + k for layer k


@pytest.mark.parametrize("field", Key._fields)
@pytest.mark.parametrize("value", [-1, WORD])
def test_refuses_a_field_that_is_no_64_bit_word(field, value):
    key = Key(seed=0)._replace(**{field: value})
    with pytest.raises(ValueError, match=rf"^key\.{field} must be in \[0, 2\*\*64\), got {value}"):
        random_uint16(key, 1)
