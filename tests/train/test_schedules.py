"""Learning rate factors by hand, at the steps where the shape changes."""

import math

import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.train import schedules
from moe_jax.train.schedules import Constant, Cosine, WarmupStableDecay


def factors(options, steps):
    schedule = schedules.make_schedule(options, steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_constant():
    found = factors(Constant(warmup_steps=4), 10)
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75] + [1] * 8, rtol=1e-6)


def test_cosine():
    found = factors(Cosine(warmup_steps=4, final=0.1), 12)
    cosine = lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2
    assert found[0] == pytest.approx(0.25)
    assert found[3] == pytest.approx(1.0), "the last step of the warm-up"
    assert found[4] == pytest.approx(1.0), "the first step of the cosine"
    assert found[8] == pytest.approx(0.55), "half way down"
    assert found[11] == pytest.approx(cosine(7 / 8)), "the last step"
    assert found[12] == pytest.approx(0.1), "just after the last step"


def test_warmup_stable_decay():
    options = WarmupStableDecay(warmup_steps=4, decay_fraction=0.25, final=0.2)
    found = factors(options, 20)
    np.testing.assert_allclose(found[:4], [0.25, 0.5, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(found[4:16], 1, rtol=1e-6)
    # The last quarter of 20 steps: t = 0, 1/5, ... 4/5.
    shape = [1 - math.sqrt(k / 5) for k in range(6)]
    np.testing.assert_allclose(found[15:], 0.2 + 0.8 * np.array(shape), rtol=1e-5)


@pytest.mark.parametrize("kind", [Constant, Cosine, WarmupStableDecay])
@pytest.mark.parametrize("warmup", [0, 1, 100])
def test_no_jumps(kind, warmup):
    found = factors(kind(warmup_steps=warmup), 1000)
    assert found.max() == pytest.approx(1.0)
    steps = np.abs(np.diff(found))
    # The steepest is a ramp of 1/100, or the first step of 1 - sqrt(t), t = 1/200.
    steepest = math.sqrt(1 / 200) if kind is WarmupStableDecay else 1 / 100
    assert steps.max() < 1.01 * steepest
    assert found[0] == pytest.approx(1 / max(1, warmup))


def test_warmup_over_the_whole_run():
    np.testing.assert_allclose(
        factors(Cosine(warmup_steps=4), 4)[:4], [0.25, 0.5, 0.75, 1], rtol=1e-6
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (Constant(warmup_steps=61), "config.schedule.warmup_steps=61: must lie in"),
        (Cosine(warmup_steps=-1), "config.schedule.warmup_steps=-1: must lie in"),
        (Cosine(warmup_steps=5, final=1.5), "config.schedule.final=1.5: must lie in"),
        (
            WarmupStableDecay(warmup_steps=5, decay_fraction=0.0),
            "config.schedule.decay_fraction=0.0: must lie in",
        ),
        (
            WarmupStableDecay(warmup_steps=50, decay_fraction=0.2),
            "warmup_steps=50 reaches into the decay, the last 0.2 of 60 steps",
        ),
    ],
)
def test_problems(tiny, options, message):
    tiny.schedule = options
    with pytest.raises(UserError) as error:
        config_lib.validate(tiny)
    assert message in str(error.value)


def test_no_problems(tiny):
    tiny.schedule = WarmupStableDecay(warmup_steps=48, decay_fraction=0.2)
    config_lib.validate(tiny)
