"""The order of the samplers on a normal distribution, whose exact flow is known.

Data x0 ~ N(2, 1/4): x ~ N(2 alpha, alpha^2 / 4 + sigma^2), and the probability flow
keeps the number of standard deviations from the mean.
"""

import functools

import diffusion_oracles as slow
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.diffusion import guidance, samplers
from moe_jax.diffusion.processes import make_process
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.diffusion.samplers.ddim import DDIM
from moe_jax.diffusion.samplers.deis import DEIS
from moe_jax.diffusion.samplers.dpm_solver import DPMSolverPP
from moe_jax.diffusion.samplers.euler import Euler
from moe_jax.diffusion.samplers.heun import Heun

pytestmark = pytest.mark.usefixtures("float64")
MEAN, STD, START = 2.0, 0.5, 1.3
FLOW = make_process(RectifiedFlow())
SCHEDULE = slow.schedule(variance="fixed_small")


def exact_network(process, x, time):
    alpha, sigma = process.levels(time, x)
    away = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    x0, eps = MEAN + alpha * STD**2 * away, sigma * away
    return eps - x0 if process is FLOW else eps


def on_a_schedule():
    """Where the flow leads to: down to index 0, and the mean of the data from there."""
    bar = np.array(slow.bars_of(slow.betas_of("linear", 1000)))[[999, 0]]
    std = np.sqrt(bar * STD**2 + 1 - bar)
    z = (START - np.sqrt(bar[0]) * MEAN) / std[0]
    return MEAN + np.sqrt(bar[1]) * STD**2 / std[1] * z


def errors(options, process, counts):
    want = MEAN + STD * START if process is FLOW else on_a_schedule()
    denoise = functools.partial(exact_network, process)
    found = []
    for count in counts:
        options.steps = count
        x = jnp.full((1, 1, 1, 1), START)
        result = samplers.sample(
            options, guidance.Unguided(), process, denoise, None, x, jax.random.key(0)
        )
        found.append(abs(float(result.images.squeeze()) - want))
    return np.array(found)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (Euler(), [0.0465, 0.0236, 0.0119]),
        (DDIM(), [0.0465, 0.0236, 0.0119]),
        (Heun(), [6.6e-4, 1.8e-4, 4.6e-5]),
    ],
)
def test_published_errors_on_a_flow(options, want):
    np.testing.assert_allclose(errors(options, FLOW, [20, 40, 80]), want, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "process", "counts", "low", "high"),
    [
        (DPMSolverPP(), FLOW, [80, 160], 3.2, 4.1),
        (DEIS(order=1), FLOW, [20, 40], 3.7, 4.1),
        (DEIS(order=2), FLOW, [20, 40], 3.9, 7.0),
        (DEIS(order=3), FLOW, [40, 80], 3.9, 7.0),
        (Euler(), SCHEDULE, [40, 80], 1.9, 2.1),
        (DDIM(), SCHEDULE, [40, 80], 1.9, 2.1),
        (Heun(), SCHEDULE, [40, 80], 3.8, 4.4),
        (Heun(spacing="karras"), SCHEDULE, [20, 40], 3.8, 6.0),
        (DPMSolverPP(), SCHEDULE, [40, 80, 160], 3.6, 4.3),
        (DEIS(order=1), SCHEDULE, [20, 40], 3.6, 4.3),
        (DEIS(order=2), SCHEDULE, [10, 20, 40], 7.0, 12.0),
    ],
)
def test_halving_the_steps(options, process, counts, low, high):
    """The error falls by 2^order; few steps of low order begin and end some methods."""
    found = errors(options, process, counts)
    ratios = found[:-1] / found[1:]
    assert np.all((low < ratios) & (ratios < high)), (found, ratios)


def test_higher_order_is_better_at_twenty_steps():
    found = [errors(DEIS(order=q), FLOW, [20])[0] for q in (0, 1, 2)]
    assert found[0] > 8 * found[1] > 64 * found[2], found


def test_deis_coefficients_equal_exact_integrals():
    from moe_jax.diffusion.samplers import deis

    grid = FLOW.grid(5, "even", 1.0)
    found = deis.coefficients(FLOW, grid, 2)
    assert np.all(found[0] == 0) and found[1, 1] == 0
    # Step 2 is from 0.6 to 0.4; d(t / (1 - t)) = dt / (1 - t)^2.
    t = np.linspace(0.6, 0.4, 200_001)
    weight = 1 / (1 - t) ** 2
    late = (t - 0.6) * (t - 1.0) / ((0.8 - 0.6) * (0.8 - 1.0))
    early = (t - 0.6) * (t - 0.8) / ((1.0 - 0.6) * (1.0 - 0.8))
    want = [0.6 * np.trapezoid(p * weight, t) for p in (late, early)]
    np.testing.assert_allclose(found[2], want, rtol=1e-5)
