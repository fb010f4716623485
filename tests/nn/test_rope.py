"""Rotary positions: pairs by complex numbers, tables by hand and by transformers."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn import rope
from moe_jax.nn.rope import Linear, Llama3, LongRope, Rope, YaRN


def turned(x, position, frequencies, pairs, magnitude=1.0):
    """Pairs of indices of a vector as complex numbers, turned; the rest as it is."""
    out = np.array(x)
    for (i, j), frequency in zip(pairs, frequencies, strict=True):
        number = complex(x[i], x[j]) * np.exp(1j * position * frequency) * magnitude
        out[i], out[j] = number.real, number.imag
    return out


@pytest.mark.parametrize(
    "options, width, pairs",
    [
        (Rope(theta=50.0), 6, [(0, 3), (1, 4), (2, 5)]),
        (Rope(theta=50.0, interleaved=True), 6, [(0, 1), (2, 3), (4, 5)]),
        (Rope(theta=50.0, fraction=0.5), 8, [(0, 2), (1, 3)]),
        # int(0.4 * 10), as transformers has it.
        (Rope(theta=50.0, fraction=0.4, interleaved=True), 10, [(0, 1), (2, 3)]),
        (
            Rope(theta=50.0, scaling=YaRN(attention_factor=1.5)),
            4,
            [(0, 2), (1, 3)],
        ),
    ],
    ids=str,
)
def test_rope_turns_pairs(float64, options, width, pairs):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, width))
    positions = np.array([[0, 1, 2, 0, 1], [7, 0, 100, 3, 2]], np.int32)
    given = jnp.asarray(x), positions, options
    found = rope.rotate(*given, length=128)
    frequencies = 50.0 ** (-np.arange(len(pairs)) / len(pairs))
    magnitude = 1.5 if options.scaling else 1.0
    for b, s, h in np.ndindex(2, 5, 3):
        row = positions[b, s], frequencies, pairs, magnitude
        want = turned(x[b, s, h], *row)
        np.testing.assert_allclose(found[b, s, h], want, rtol=1e-10, atol=1e-12)
    half = rope.rotate(*given, length=128, scale=0.5)
    np.testing.assert_allclose(half, found / 2, rtol=1e-12, atol=1e-15)


def test_rope_scores_depend_on_the_distance_only(float64):
    q, k = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 1, 1, 8)))

    def at(x, position):
        positions = np.array([[position]], np.int32)
        return np.asarray(rope.rotate(x, positions, Rope(), length=128)).ravel()

    score = lambda m, n: at(q, m) @ at(k, n)
    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-9)
    np.testing.assert_allclose(score(0, 0), q.ravel() @ k.ravel(), rtol=1e-12)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_llama3_by_hand():
    """Wavelengths of 2 pi times 1, 10, 100, 1000 over a length of 2 pi 100."""
    scaling = Llama3(
        factor=4.0,
        low_frequency_factor=0.5,
        high_frequency_factor=2.0,
        original_length=round(200 * math.pi),
    )
    found = rope.table(Rope(theta=10000.0, scaling=scaling), 8, 0).frequencies
    # They turn 100, 10, 1 and 0.1 times; the third is a third of the way up.
    want = [1, 0.1, 0.01 * (1 / 3 + 2 / 3 / 4), 0.001 / 4]
    np.testing.assert_allclose(found, want, rtol=1e-3)


def test_yarn_by_hand():
    """Eight pairs over a length of 2 pi 1000: pair i turns 1000 * 10^(-i / 2) times."""
    ramp = dict(beta_fast=100.0, beta_slow=1.0, original_length=6283)
    options = Rope(theta=1e4, scaling=YaRN(factor=10.0, **ramp))
    made = rope.table(options, 16, 0)
    plain = 10.0 ** (-np.arange(8) / 2)
    # Pair 2 turns 100 times, pair 6 once: kept up to 2, divided from 6 on. The length
    # is a little short of 2 pi 1000, so that whole pairs are 1 and 6.
    divided = np.clip((np.arange(8) - 1) / 5, 0, 1)
    want = plain * (1 - divided) + plain / 10 * divided
    np.testing.assert_allclose(made.frequencies, want, rtol=1e-9)
    assert made.magnitude == pytest.approx(0.1 * math.log(10) + 1)
    options.scaling.truncate = False
    divided = np.clip((np.arange(8) - 2) / 4, 0, 1)
    want = plain * (1 - divided) + plain / 10 * divided
    found = rope.table(options, 16, 0).frequencies
    np.testing.assert_allclose(found, want, rtol=1e-3)


def test_yarn_scales_scores_and_tables():
    scaling = YaRN(factor=40.0, mscale=0.707, mscale_all_dim=1.0)
    grown = lambda m: 0.1 * m * math.log(40) + 1
    options = Rope(scaling=scaling)
    magnitude = rope.table(options, 16, 0).magnitude
    assert magnitude == pytest.approx(grown(0.707) / grown(1))
    assert rope.latent_scale(options) == pytest.approx(grown(1) ** 2)
    assert rope.latent_scale(Rope()) == rope.latent_scale(Rope(scaling=YaRN())) == 1
    scaling.attention_factor = 1.25
    assert rope.table(options, 16, 0).magnitude == 1.25


def test_long_rope_takes_the_factors_of_the_length():
    scaling = LongRope(
        short_factor=(1.0, 2.0),
        long_factor=(4.0, 8.0),
        original_length=16,
        short_mscale=1.5,
        long_mscale=2.5,
    )
    options = Rope(theta=100.0, scaling=scaling)
    short, long = (rope.table(options, 4, length) for length in (16, 17))
    np.testing.assert_allclose(short.frequencies, [1, 0.05])
    np.testing.assert_allclose(long.frequencies, [1 / 4, 0.1 / 8])
    assert (short.magnitude, long.magnitude) == (1.5, 2.5)


def hugging_face(kind, theta, width, longest, length=None, **parameters):
    """The frequencies and the magnitude of transformers, in float32."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    made = transformers.LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        head_dim=width,
        max_position_embeddings=longest,
        rope_parameters=dict(rope_type=kind, rope_theta=theta, **parameters),
    )
    found, magnitude = utils.ROPE_INIT_FUNCTIONS[kind](made, "cpu", seq_len=length)
    return found.numpy(), magnitude


_DEEPSEEK = dict(beta_fast=32, beta_slow=1, factor=40)
# Made up, but of the published shape: 64 growing factors a pair.
_SHORT = tuple(1 + i / 64 for i in range(64))
_LONG = tuple(1 + i for i in range(64))
_PHI = dict(short_factor=_SHORT, long_factor=_LONG)
_MSCALE = 1.243163121016122  # Of the released config of Phi-3.5-MoE.
PUBLISHED = {
    "deepseek_v2_lite": (
        Rope(
            scaling=YaRN(
                **_DEEPSEEK, mscale=0.707, mscale_all_dim=0.707, original_length=4096
            ),
        ),
        64,
        ("yarn", 1e4, 64, 163840),
        dict(
            **_DEEPSEEK,
            mscale=0.707,
            mscale_all_dim=0.707,
            original_max_position_embeddings=4096,
        ),
    ),
    "deepseek_v3": (
        Rope(
            scaling=YaRN(
                **_DEEPSEEK, mscale=1.0, mscale_all_dim=1.0, original_length=4096
            ),
        ),
        64,
        ("yarn", 1e4, 64, 163840),
        dict(
            **_DEEPSEEK,
            mscale=1.0,
            mscale_all_dim=1.0,
            original_max_position_embeddings=4096,
        ),
    ),
    "gpt_oss": (
        Rope(
            theta=150000.0,
            scaling=YaRN(factor=32.0, original_length=4096, truncate=False),
        ),
        64,
        ("yarn", 150000.0, 64, 131072),
        dict(
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=4096,
        ),
    ),
    "llama_3.1": (
        Rope(theta=500000.0, scaling=Llama3()),
        128,
        ("llama3", 500000.0, 128, 131072),
        dict(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "linear": (
        Rope(scaling=Linear(factor=4.0)),
        128,
        ("linear", 1e4, 128, 16384),
        dict(factor=4.0),
    ),
}


def equal_tables(found, frequencies, magnitude):
    """In float32: frequencies to four units in the last place, tables alike."""
    mine = found.frequencies.astype(np.float32)
    np.testing.assert_allclose(mine, frequencies, rtol=5e-7)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-12)
    positions = np.arange(64, dtype=np.float32)[:, None]
    for turn in (np.cos, np.sin):
        a, b = turn(positions * mine), turn(positions * frequencies)
        np.testing.assert_allclose(a, b, atol=64 * 5e-7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_are_those_of_transformers(name):
    options, width, given, parameters = PUBLISHED[name]
    wanted = hugging_face(*given, **parameters)
    equal_tables(rope.table(options, width, 4096), *wanted)


@pytest.mark.parametrize("length", [64, 4096, 4097, 131072])
def test_long_rope_is_that_of_transformers(length):
    """Its frequencies; the magnitude is a number of the config (Phi-3.5-MoE)."""
    scaling = LongRope(**_PHI, short_mscale=_MSCALE, long_mscale=_MSCALE)
    frequencies, _ = hugging_face(
        "longrope",
        1e4,
        128,
        131072,
        length,
        **{name: list(factors) for name, factors in _PHI.items()},
        original_max_position_embeddings=4096,
    )
    equal_tables(rope.table(Rope(scaling=scaling), 128, length), frequencies, _MSCALE)


@pytest.mark.parametrize(
    "options, words",
    [
        (Rope(theta=1.0), "theta=1.0: must be more than 1"),
        (Rope(fraction=0.0), r"fraction=0.0: must lie in \(0, 1\]"),
        (Linear(factor=0.5), "factor=0.5: must be at least 1"),
        (Llama3(low_frequency_factor=4.0), "low_frequency_factor=4.0: must lie"),
        (YaRN(beta_slow=40.0), "beta_slow=40.0: must lie between 0 and beta_fast=32"),
        (YaRN(mscale=0.7), "mscale=0.7 counts only with mscale_all_dim"),
        (YaRN(original_length=0), "original_length=0: must be at least 1"),
        (LongRope(short_mscale=0.0), "short_mscale=0.0: must be more than 0"),
        (LongRope(long_factor=(1.0, 0.0)), "long_factor: every factor"),
    ],
    ids=str,
)
def test_problems(options, words):
    (line,) = options.problems("config.model.rope", None)
    assert re.search(words, line)


def test_problems_of_a_width():
    problems = lambda options, width: list(
        options.width_problems("config.model.rope", width, "config.model.head_dim")
    )
    assert problems(Rope(), 8) == []
    (odd,) = problems(Rope(fraction=0.5), 6)
    assert odd == (
        "config.model.head_dim=6: rotary positions turn pairs, and config.model.rope."
        "fraction=0.5 of it is 3; set an even one"
    )
    scaling = LongRope(short_factor=(1.0,) * 4, long_factor=(1.0,) * 3)
    (few,) = problems(Rope(scaling=scaling), 8)
    assert "long_factor has 3 factors: it needs one for each of 4 pairs" in few
    assert problems(Rope(scaling=scaling).shrunk(6), 6) == []
