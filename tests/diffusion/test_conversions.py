"""Conversions and the conventions of the two processes."""

import itertools

import diffusion_oracles as slow
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.diffusion import conversions
from moe_jax.diffusion.processes import make_process
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.diffusion.processes.variance_preserving import VariancePreserving
from moe_jax.errors import UserError

X0, EPS = slow.images(seed=1), slow.images(seed=2)
LEVELS = {"schedule": (0.6, 0.8), "flow": (0.3, 0.7)}


@pytest.mark.parametrize("path", LEVELS)
@pytest.mark.parametrize(
    ("old", "new"), list(itertools.product(conversions.KINDS, repeat=2))
)
def test_every_kind_becomes_every_other(path, old, new):
    alpha, sigma = LEVELS[path]
    x = alpha * X0 + sigma * EPS
    given = conversions.target(old, X0, EPS, alpha, sigma)
    found = conversions.convert(old, new, given, x, alpha, sigma)
    want = conversions.target(new, X0, EPS, alpha, sigma)
    np.testing.assert_allclose(found, want, rtol=2e-6, atol=2e-6)
    x0, eps = conversions.split(old, given, x, alpha, sigma)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, x, atol=2e-6)


def test_targets_by_hand():
    def of(kind):
        return conversions.target(kind, 2.0, 5.0, 0.6, 0.8)

    found = [of(kind) for kind in conversions.KINDS]
    np.testing.assert_allclose(found, [2, 5, 0.6 * 5 - 0.8 * 2, 3, -3, -5 / 0.8])


@pytest.mark.parametrize("path", LEVELS)
@pytest.mark.parametrize("kind", conversions.KINDS)
def test_weights_give_the_same_loss_for_every_kind(path, kind):
    alpha, sigma = LEVELS[path]
    x = alpha * X0 + sigma * EPS
    wrong = slow.images(seed=3)
    exact = conversions.target(kind, X0, EPS, alpha, sigma)
    x0, _ = conversions.split(kind, wrong, x, alpha, sigma)
    weight = conversions.weight_from_x0(kind, 1.7, alpha, sigma)
    np.testing.assert_allclose(
        weight * (wrong - exact) ** 2, 1.7 * (x0 - X0) ** 2, rtol=1e-3, atol=1e-5
    )


def test_an_unknown_kind_is_refused():
    for call in (conversions.target, conversions.split):
        with pytest.raises(ValueError, match="kind 'eps'"):
            call("eps", X0, EPS, 0.5, 0.5)


def test_noise_of_a_schedule_at_its_ends():
    process = slow.schedule()
    time = jnp.array([0, 999])
    x = process.add_noise(X0, EPS, time)
    bars = [0.9999, 4.03582977e-5]
    for row, bar in enumerate(bars):
        want = np.sqrt(bar) * X0[row] + np.sqrt(1 - bar) * EPS[row]
        np.testing.assert_allclose(x[row], want, atol=1e-6)
    np.testing.assert_array_equal(process.target(X0, EPS, time), EPS)
    np.testing.assert_array_equal(process.network_time(time), [0.0, 999.0])
    np.testing.assert_allclose(process.noise_time(time), [5e-4, 0.9995])
    everywhere = jnp.arange(1000)
    back = process.from_noise_time(process.noise_time(everywhere))
    np.testing.assert_array_equal(back, everywhere)
    ends = process.from_noise_time(jnp.array([0.0, 0.9999999, 1.0]))
    assert ends.tolist() == [0, 999, 999] and ends.dtype == jnp.int32


def test_x0_by_epsilon_equals_the_formula():
    process, time = slow.schedule(), jnp.array([3, 700])
    x = slow.images(seed=4)
    x0, _ = process.split(jnp.asarray(EPS), x, *process.levels(time, x))
    bars = np.array(slow.bars_of(slow.betas_of("linear", 1000)))[[3, 700]]
    bars = bars[:, None, None, None]
    want = (x - np.sqrt(1 - bars) * EPS) / np.sqrt(bars)
    np.testing.assert_allclose(x0, want, rtol=1e-5, atol=1e-6)


def test_both_directions_of_a_flow():
    time = jnp.array([0.25, 1.0])
    part = np.array([0.25, 1.0], np.float32)[:, None, None, None]
    up = make_process(RectifiedFlow())
    np.testing.assert_allclose(
        up.add_noise(X0, EPS, time), (1 - part) * X0 + part * EPS, rtol=1e-6
    )
    np.testing.assert_array_equal(up.target(X0, EPS, time), EPS - X0)
    down = make_process(RectifiedFlow(direction="data_at_1", time_input="1000t"))
    np.testing.assert_allclose(
        down.add_noise(X0, EPS, time), part * X0 + (1 - part) * EPS, rtol=1e-6
    )
    np.testing.assert_array_equal(down.target(X0, EPS, time), X0 - EPS)
    np.testing.assert_array_equal(up.network_time(time), [0.25, 1.0])
    np.testing.assert_array_equal(down.network_time(time), [250.0, 1000.0])
    np.testing.assert_array_equal(up.noise_time(time), [0.25, 1.0])
    np.testing.assert_array_equal(down.noise_time(time), [0.75, 0.0])
    np.testing.assert_array_equal(down.from_noise_time(time), [0.75, 0.0])


@pytest.mark.parametrize("direction", ["noise_at_1", "data_at_1"])
def test_a_flow_moves_along_its_velocity(direction):
    process = make_process(RectifiedFlow(direction=direction))
    time = jnp.full((2,), 0.3)
    _, moved = jax.jvp(lambda t: process.add_noise(X0, EPS, t), (time,), (jnp.ones(2),))
    np.testing.assert_allclose(moved, process.target(X0, EPS, time), atol=1e-6)
    x = process.add_noise(X0, EPS, time)
    levels = process.levels(time, x)
    # Channels beyond those of the image are not read.
    wide = jnp.concatenate([process.target(X0, EPS, time), 9 * jnp.ones_like(x)], -1)
    x0, eps = process.split(wide, x, *levels)
    np.testing.assert_allclose(x0, X0, atol=1e-6)
    np.testing.assert_allclose(eps, EPS, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (VariancePreserving(schedule="sqrt"), "p.schedule='sqrt'"),
        (VariancePreserving(prediction="eps"), "p.prediction='eps'"),
        (VariancePreserving(variance="learned"), "p.variance='learned'"),
        (VariancePreserving(steps=20), "p.steps=20: must be at least 21"),
        (RectifiedFlow(direction="up"), "p.direction='up'"),
        (RectifiedFlow(time_input="index"), "p.time_input='index'"),
    ],
)
def test_conventions_that_are_not_known(options, said):
    (problem,) = options.problems("p", config.Config())
    assert problem.startswith(said)


def test_grids_that_a_process_does_not_have():
    flow = make_process(RectifiedFlow())
    with pytest.raises(UserError, match="a flow takes 'even'"):
        flow.grid(10, "karras", 1.0)
    with pytest.raises(UserError, match="shift=3: a process with a schedule"):
        slow.schedule().grid(10, "even", 3.0)
    with pytest.raises(UserError, match="spacing='odd'"):
        slow.schedule().grid(10, "odd", 1.0)


def test_grids_of_both_processes():
    grid = slow.schedule().grid(50, "even", 1.0)
    assert grid.times[[0, 1, -2, -1]].tolist() == [999, 979, 0, -1]
    assert grid.alpha[-1] == 1 and grid.sigma[-1] == 0
    np.testing.assert_allclose(grid.alpha**2 + grid.sigma**2, 1)
    grid = make_process(RectifiedFlow(direction="data_at_1")).grid(4, "even", 1.0)
    np.testing.assert_allclose(grid.times, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(grid.sigma, [1, 0.75, 0.5, 0.25, 0])
    grid = make_process(RectifiedFlow()).grid(2, "even", 3.0)
    np.testing.assert_allclose(grid.times, [1, 0.75, 0])


@pytest.mark.parametrize(
    "options",
    [
        VariancePreserving(),
        VariancePreserving(steps=50),
        RectifiedFlow(),
        RectifiedFlow(direction="data_at_1", time_input="1000t"),
    ],
)
def test_the_ends_of_the_network_s_time(options):
    process = make_process(options)
    ends = process.from_noise_time(jnp.array([0.0, 1.0]))
    assert tuple(process.network_time(ends).tolist()) == options.network_ends
