"""Guidance: its formulas, and that what is skipped is not evaluated."""

import collections

import diffusion_oracles as slow
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.diffusion import guidance, samplers
from moe_jax.diffusion.processes import make_process
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.diffusion.samplers.ddim import DDIM
from moe_jax.diffusion.samplers.ddpm import DDPM
from moe_jax.diffusion.samplers.deis import DEIS
from moe_jax.diffusion.samplers.dpm_solver import DPMSolverPP
from moe_jax.diffusion.samplers.euler import Euler
from moe_jax.diffusion.samplers.heun import Heun
from moe_jax.errors import UserError

FLOW = make_process(RectifiedFlow())
KEY = jax.random.key(0)
NOISE = jnp.asarray(slow.images((2, 2, 2, 4)))
MAIN, OTHER = slow.images((2, 2, 2, 8), seed=1), slow.images((2, 2, 2, 8), seed=2)
TIME = jnp.array([0.5, 0.5])


def constant(value):
    return lambda x, time: jnp.asarray(value)


def velocity(shift):
    """A denoiser of a flow that depends on x and on the time."""
    return lambda x, time: 0.3 * x - shift * (1 + time[:, None, None, None])


def told(options):
    return guidance.guide(options, FLOW, constant(MAIN), constant(OTHER))(NOISE, TIME)


@pytest.mark.parametrize("channels", [0, 3, 1])
def test_classifier_free_guides_the_first_channels(channels):
    found = told(guidance.ClassifierFree(scale=4.0, channels=channels))
    count = channels or 4
    want = MAIN.copy()
    want[..., :count] = OTHER[..., :count] + 4 * (MAIN - OTHER)[..., :count]
    np.testing.assert_allclose(found.prediction, want, rtol=1e-6)
    np.testing.assert_array_equal(found.prediction[..., count:], MAIN[..., count:])
    np.testing.assert_array_equal(found.renoise, found.prediction)
    assert int(found.evaluations) == 2


def test_autoguidance_leads_away_from_the_bad_network():
    found = told(guidance.Autoguidance(scale=2.1))
    want = OTHER[..., :4] + 2.1 * (MAIN - OTHER)[..., :4]
    np.testing.assert_allclose(found.prediction[..., :4], want, rtol=1e-6)
    np.testing.assert_array_equal(found.prediction[..., 4:], MAIN[..., 4:])


def test_cfg_plus_plus_has_two_answers():
    found = told(guidance.CFGPlusPlus(scale=0.25))
    want = 0.75 * OTHER[..., :4] + 0.25 * MAIN[..., :4]
    np.testing.assert_allclose(found.prediction[..., :4], want, atol=1e-6)
    np.testing.assert_array_equal(found.renoise, OTHER)


def test_scale_one_is_the_network_alone():
    for options in (guidance.ClassifierFree(scale=1.0), guidance.Autoguidance(scale=1)):
        found = told(options)
        np.testing.assert_array_equal(found.prediction, MAIN)
        assert int(found.evaluations) == 1


def test_guidance_is_the_same_in_x0_and_in_epsilon():
    """The same networks, asked for another prediction."""

    def images(kind):
        process = slow.schedule(prediction=kind, variance="fixed_small")

        def denoiser(shift):
            def predict(x, time):
                eps = 0.2 * x + shift
                levels = process.levels(time, x)
                if kind == "epsilon":
                    return eps
                x0 = (x - levels[1] * eps) / levels[0]
                v = levels[0] * eps - levels[1] * x0
                return x0 if kind == "x0" else v

            return predict

        options = guidance.ClassifierFree(scale=3.0)
        ask = samplers.sample(
            DDIM(steps=5), options, process, denoiser(0.3), denoiser(0.1), NOISE, KEY
        )
        return np.asarray(ask.images)

    want = images("epsilon")
    scale = np.abs(want).max()
    np.testing.assert_allclose(images("x0") / scale, want / scale, atol=1e-4)
    np.testing.assert_allclose(images("v") / scale, want / scale, atol=1e-4)


class Counted:
    """A denoiser that counts when it runs, not when it is traced."""

    def __init__(self, shift):
        self.times, self.inner = collections.Counter(), velocity(shift)

    def __call__(self, x, time):
        jax.debug.callback(lambda t: self.times.update([round(float(t), 4)]), time[0])
        return self.inner(x, time)


def run(options, guided_by, process=FLOW):
    main, other = Counted(0.5), Counted(0.2)
    found = jax.jit(
        lambda x: samplers.sample(options, guided_by, process, main, other, x, KEY)
    )(NOISE)
    jax.block_until_ready(found)
    jax.effects_barrier()
    return found, main.times, other.times


@pytest.mark.parametrize("kind", [guidance.ClassifierFree, guidance.Autoguidance])
@pytest.mark.parametrize(
    ("low", "high", "acts"),
    [
        (0.0, 0.0, range(1, 11)),
        (0.3, 0.7, [4, 5, 6, 7]),  # Above low, up to high itself.
        (0.0, 0.5, [1, 2, 3, 4, 5]),
        (0.95, 0.0, [10]),
    ],
)
def test_outside_the_interval_the_second_network_does_not_run(kind, low, high, acts):
    found, main, other = run(Euler(steps=10), kind(scale=3.0, low=low, high=high))
    assert sorted(main.elements()) == [i / 10 for i in range(1, 11)]
    assert sorted(other.elements()) == [i / 10 for i in acts]
    assert int(found.evaluations) == 10 + len(acts)


def test_images_with_an_interval_are_those_of_a_loop():
    found, _, _ = run(Euler(steps=10), guidance.ClassifierFree(scale=3.0, low=0.35))
    x = np.asarray(NOISE, np.float64)
    for i in range(10, 0, -1):
        v = 0.3 * x - 0.5 * (1 + i / 10)
        null = 0.3 * x - 0.2 * (1 + i / 10)
        x = x - (null + 3 * (v - null) if i > 3 else v) / 10
    np.testing.assert_allclose(found.images, x, atol=1e-5)


def test_the_interval_in_sigma_and_at_data():
    # sigma / alpha of t is t / (1 - t): 3/2 at 0.6, 4 at 0.8.
    options = guidance.ClassifierFree(low=1.45, high=4.1, unit="sigma")
    _, _, other = run(Euler(steps=10), options)
    assert sorted(other.elements()) == [0.6, 0.7, 0.8]
    down = make_process(RectifiedFlow(direction="data_at_1"))
    _, _, other = run(Euler(steps=4), guidance.ClassifierFree(low=0.6), down)
    assert sorted(other.elements()) == [0.0, 0.25]
    process = slow.schedule(variance="fixed_small")
    options = guidance.ClassifierFree(low=0.9, unit="time")
    _, main, other = run(DDIM(steps=10, spacing="ddim"), options, process)
    assert sorted(main.elements()) == [100 * i for i in range(10)]
    assert sorted(other.elements()) == [900]


@pytest.mark.parametrize(
    ("options", "process", "count"),
    [
        (Heun(steps=4), FLOW, 8),
        (Heun(steps=4), slow.schedule(variance="fixed_small"), 7),
        (DDPM(steps=4), slow.schedule(variance="fixed_small"), 4),
        (DPMSolverPP(steps=4), FLOW, 4),
        (DEIS(steps=4), FLOW, 4),
        (DDIM(steps=4), FLOW, 4),
    ],
)
def test_evaluations_are_counted_as_they_are(options, process, count):
    found, main, other = run(options, guidance.ClassifierFree(scale=2.0), process)
    assert main.total() == other.total() == count
    assert int(found.evaluations) == 2 * count


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cfg_plus_plus_at_zero_is_unconditional_ddim(eta):
    process = slow.schedule(variance="fixed_small")
    main, other = velocity(0.005), velocity(0.002)
    guided = samplers.sample(
        DDIM(steps=8, eta=eta),
        *(guidance.CFGPlusPlus(scale=0.0), process, main, other, NOISE, KEY),
    )
    plain = samplers.sample(
        DDIM(steps=8, eta=eta),
        *(guidance.Unguided(), process, other, None, NOISE, KEY),
    )
    np.testing.assert_allclose(guided.images, plain.images, rtol=2e-6)
    assert int(guided.evaluations) == 16 and int(plain.evaluations) == 8


def test_cfg_plus_plus_against_a_loop():
    process = slow.schedule(variance="fixed_small")
    bars = slow.bars_of(slow.betas_of("linear", 1000))
    found = samplers.sample(
        DDIM(steps=3),
        *(guidance.CFGPlusPlus(scale=0.6), process),
        *(velocity(0.01), velocity(0.02), NOISE, KEY),
    ).images
    x = np.asarray(NOISE, np.float64)
    for index, following in ((999, 500), (500, 0), (0, None)):
        bar, after = bars[index], 1.0 if following is None else bars[following]
        eps, null = (0.3 * x - s * (1 + index) for s in (0.01, 0.02))
        guided = null + 0.6 * (eps - null)
        x0 = (x - np.sqrt(1 - bar) * guided) / np.sqrt(bar)
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * null
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4 * np.abs(x).max())


def test_model_guidance_moves_the_target_of_kept_labels():
    target, dropped = slow.images((3, 2, 2, 4)), jnp.array([False, True, False])
    main, null = (jnp.asarray(slow.images((3, 2, 2, 8), seed=s)) for s in (5, 6))
    found = guidance.model_guidance_target(target, main, null, 0.7, dropped)
    want = target + 0.7 * np.asarray(main - null)[..., :4]
    want[1] = target[1]
    np.testing.assert_allclose(found, want, rtol=1e-6)
    base = guidance.model_guidance_target(target, main, null, 0.0, dropped)
    np.testing.assert_array_equal(base, target)
    slope = jax.grad(
        lambda m: guidance.model_guidance_target(target, m, null, 0.7, dropped).sum()
    )(main)
    assert np.all(slope == 0)


@pytest.mark.parametrize("options", [Euler(), Heun(), DPMSolverPP(), DEIS()])
def test_cfg_plus_plus_is_for_ddim(options):
    with pytest.raises(UserError, match="choose DDIM"):
        samplers.sample(
            options, guidance.CFGPlusPlus(), FLOW, velocity(0), velocity(0), NOISE, KEY
        )


def test_a_second_network_is_neither_missing_nor_ignored():
    with pytest.raises(UserError, match="ClassifierFree: takes two denoisers"):
        guidance.guide(guidance.ClassifierFree(), FLOW, velocity(0.0))
    with pytest.raises(UserError, match="Unguided: takes one denoiser"):
        guidance.guide(guidance.Unguided(), FLOW, velocity(0.0), velocity(0.0))
    with pytest.raises(UserError, match="channels=5: the images have 4"):
        told(guidance.ClassifierFree(channels=5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (guidance.ClassifierFree(low=0.5, high=0.4), "p.low=0.5, p.high=0.4"),
        (guidance.ClassifierFree(low=-0.5), "p.low=-0.5"),
        (guidance.ClassifierFree(channels=-1), "p.channels=-1"),
        (guidance.Autoguidance(unit="steps"), "p.unit='steps'"),
        (guidance.CFGPlusPlus(scale=1.5), "p.scale=1.5"),
    ],
)
def test_values_that_are_refused(options, said):
    (problem,) = options.problems("p", config.Config())
    assert problem.startswith(said)
