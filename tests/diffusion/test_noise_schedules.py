"""Tables of DDPM: published values, slow references, respacing."""

from fractions import Fraction

import diffusion_oracles as slow
import numpy as np
import pytest

from moe_jax.diffusion import schedules
from moe_jax.errors import UserError

LINEAR = schedules.make_tables(schedules.linear_betas(1000))
PLACES = [0, 1, 500, 999]


def test_published_values_of_the_linear_schedule():
    np.testing.assert_allclose(
        LINEAR.betas[PLACES], [1e-4, 1.1991992e-4, 1.0059960e-2, 0.02], rtol=1e-7
    )
    np.testing.assert_allclose(
        LINEAR.alpha_bar[PLACES],
        [0.9999, 0.99978009, 0.0777966584, 4.03582977e-5],
        rtol=1e-8,
    )
    np.testing.assert_allclose(
        LINEAR.posterior_log_variance[PLACES],
        [-9.81672514, -9.81672514, -4.60004974, -3.91202383],
        atol=1e-8,
    )


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1000, 30])
def test_tables_equal_slow_ones(name, steps):
    tables = schedules.make_tables(schedules.BETAS[name](steps))
    betas = slow.betas_of(name, steps)
    np.testing.assert_allclose(tables.betas, betas, rtol=1e-11)
    np.testing.assert_allclose(tables.alpha_bar, slow.bars_of(betas), rtol=1e-11)
    for i in (0, 1, 2, steps // 2, steps - 1):
        mean, variance = slow.posterior(betas, i, 0.7, -1.3)
        found = 0.7 * tables.posterior_x0[i] - 1.3 * tables.posterior_x[i]
        np.testing.assert_allclose(found, mean, rtol=1e-9)
        np.testing.assert_allclose(tables.posterior_variance[i], variance, rtol=1e-9)
    assert tables.betas.dtype == np.float64 and tables.betas.max() <= 0.999


@pytest.mark.parametrize("count", [2, 3, 5, 7, 10, 50, 250, 1000])
def test_even_respacing_rounds_half_to_even(count):
    want = [round(Fraction(i * 999, count - 1)) for i in range(count)]
    np.testing.assert_array_equal(schedules.kept_indices(1000, count), want)
    np.testing.assert_array_equal(schedules.kept_indices(1000, str(count)), want)


def test_published_respacings():
    kept = schedules.kept_indices(1000, "250")
    assert kept[:5].tolist() == [0, 4, 8, 12, 16]
    assert kept[-3:].tolist() == [991, 995, 999] and len(kept) == 250
    respaced = schedules.respace(LINEAR, kept)
    np.testing.assert_allclose(
        respaced.betas[[0, 1, -1]], [1e-4, 5.990656e-4, 7.751935e-2], rtol=1e-6
    )
    assert schedules.kept_indices(1000, "50")[[0, 1, 2, 3, -1]].tolist() == [
        *(0, 20, 41, 61),
        999,
    ]
    assert schedules.kept_indices(1000, 3).tolist() == [0, 500, 999]  # 499.5.
    strided = schedules.kept_indices(1000, "ddim50")
    np.testing.assert_array_equal(strided, np.arange(0, 981, 20))


@pytest.mark.parametrize("text", ["250", "50", "ddim50", 1000])
def test_respaced_tables_keep_the_noise_and_the_indices(text):
    kept = schedules.kept_indices(1000, text)
    respaced = schedules.respace(LINEAR, kept)
    np.testing.assert_array_equal(respaced.indices, kept)
    bars = np.array(slow.bars_of(slow.betas_of("linear", 1000)))[kept]
    np.testing.assert_allclose(respaced.alpha_bar, bars, rtol=1e-11)
    before = 1.0
    for beta, bar in zip(respaced.betas, bars, strict=True):
        np.testing.assert_allclose(beta, 1 - bar / before, rtol=1e-9)
        before = bar


def test_karras_spacing_is_even_in_the_seventh_root():
    kept = schedules.karras_indices(LINEAR, 10)
    ratio = np.sqrt(1 / LINEAR.alpha_bar - 1)
    assert kept[0] == 0 and kept[-1] == 999 and len(kept) == 10
    roots = ratio[kept] ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots).mean(), rtol=0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1", "from 2 to 1000"),
        ("1001", "from 2 to 1000"),
        ("ddim", "from 2 to 1000"),
        ("10,20", "from 2 to 1000"),
        ("ddim999", "no integer stride takes 999 of 1000"),
    ],
)
def test_respacings_that_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        schedules.kept_indices(1000, text)


def test_karras_with_too_many_steps_is_refused():
    with pytest.raises(UserError, match="steps=300: its points fall on"):
        schedules.karras_indices(LINEAR, 300)
