"""Samplers against loops in float64, and published values of single steps."""

import diffusion_oracles as slow
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import config
from moe_jax.diffusion import guidance, posterior, samplers
from moe_jax.diffusion.processes import make_process
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.diffusion.samplers import ddim, ddpm
from moe_jax.diffusion.samplers.ddim import DDIM
from moe_jax.diffusion.samplers.ddpm import DDPM
from moe_jax.diffusion.samplers.deis import DEIS
from moe_jax.diffusion.samplers.dpm_solver import DPMSolverPP
from moe_jax.diffusion.samplers.euler import Euler
from moe_jax.diffusion.samplers.heun import Heun
from moe_jax.errors import UserError

BETAS = slow.betas_of("linear", 1000)
BARS = slow.bars_of(BETAS)
LEARNED, FIXED = slow.schedule(), slow.schedule(variance="fixed_small")
FLOW = make_process(RectifiedFlow())
BACK = make_process(RectifiedFlow(direction="data_at_1"))
KEY = jax.random.key(11)
NOISE = slow.images((2, 3, 3, 2))


def epsilon(x, time):
    """A smooth network that depends on x, the time and the place."""
    share = (np.asarray(time, np.float64) if isinstance(time, int) else time) / 1000
    share = share[:, None, None, None] if getattr(share, "ndim", 0) else share
    places = 0.1 * np.arange(x.shape[-1], dtype=np.float32)
    return 0.9 * x * share**0.5 + places * (1 - share)


def with_variance(x, time):
    return jnp.concatenate([epsilon(x, time), 0.3 * jnp.tanh(x)], axis=-1)


def images(options, process, denoise, x=NOISE):
    ask = jax.jit(
        lambda x: samplers.sample(
            options, guidance.Unguided(), process, denoise, None, x, KEY
        )
    )
    return np.asarray(ask(jnp.asarray(x)).images)


def fresh(step):
    return np.asarray(jax.random.normal(jax.random.fold_in(KEY, step), NOISE.shape))


def test_published_values_of_one_step():
    x = np.sin(np.arange(8, dtype=np.float32)).reshape(1, 1, 1, 8)
    time, tables = jnp.array([500]), LEARNED.tables
    prediction = np.concatenate([0.5 * x, np.full_like(x, 0.1)], axis=-1)
    x0, eps = LEARNED.split(prediction, x, *LEARNED.levels(time, x))
    learned = posterior.learned_part("learned_range", prediction, 8)
    found = posterior.log_variance(tables, "learned_range", learned, time)
    np.testing.assert_allclose(np.ravel(found), -4.5995779, rtol=1e-6)
    mean = posterior.mean(tables, x0, x, time)
    three = {"mean": mean, "x0": x0}
    levels = [np.sqrt(f) for i in (500, 499) for f in (BARS[i], 1 - BARS[i])]
    three["ddim"] = ddim.step(x0, eps, 0.0, 0.0, *levels)
    want = {
        "mean": [0, 0.8413059, 0.9091191],
        "x0": [0, 1.5683059, 1.6947186],
        "ddim": [0, 0.8435147, 0.9115059],
    }
    for name, value in three.items():
        np.testing.assert_allclose(np.ravel(value)[:3], want[name], rtol=2e-6)


def test_one_ancestral_step_with_given_noise():
    eps = slow.images(NOISE.shape, seed=9)
    v = np.full_like(NOISE, 0.2)
    for at in (0, 1, 600):
        found = ddpm.step(
            LEARNED.tables, "learned_range", 0.4 * NOISE, NOISE, v, jnp.int32(at), eps
        )
        mean, _ = slow.posterior(BETAS, at, 0.4 * NOISE.astype(np.float64), NOISE)
        std = np.exp(slow.log_variance_range(BETAS, at, 0.2) / 2)
        want = mean + (std * eps if at else 0)
        np.testing.assert_allclose(found, want, atol=1e-5)


def ancestral_loop(kept, x, variance):
    """DDPM over `kept` indices, from the last, in float64."""
    bars = [BARS[i] for i in kept]
    betas = [1 - bar / before for bar, before in zip(bars, [1.0, *bars], strict=False)]
    for step, at in enumerate(reversed(range(len(kept)))):
        eps = epsilon(x, int(kept[at]))
        x0 = (x - np.sqrt(1 - bars[at]) * eps) / np.sqrt(bars[at])
        mean, _ = slow.posterior(betas, at, x0, x)
        small = np.log(slow.posterior(betas, max(at, 1), 0.0, 0.0)[1])
        share = {
            "learned_range": (0.3 * np.tanh(x) + 1) / 2,
            "fixed_small": 0,
            "fixed_large": 1 if at else 0,
        }[variance]
        spread = np.exp((share * np.log(betas[at]) + (1 - share) * small) / 2)
        x = mean + (spread * fresh(step) if at else 0)
    return x


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_ancestral_sampling_is_a_loop(variance):
    process = slow.schedule(variance=variance)
    found = images(DDPM(steps=10), process, with_variance)
    kept = [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    want = ancestral_loop(kept, NOISE.astype(np.float64), variance)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_a_loop(eta):
    found = images(DDIM(steps=10, spacing="ddim", eta=eta), FIXED, epsilon)
    x = NOISE.astype(np.float64)
    for step, index in enumerate(range(900, -1, -100)):
        bar, before = BARS[index], BARS[index - 100] if index else 1.0
        eps = epsilon(x, index)
        x0 = (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)
        scale = eta * np.sqrt((1 - before) / (1 - bar)) * np.sqrt(1 - bar / before)
        x = np.sqrt(before) * x0 + np.sqrt(1 - before - scale**2) * eps
        x = x + scale * fresh(step)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4 * np.abs(x).max())


def test_ddim_with_eta_one_is_ancestral_sampling():
    one = images(DDIM(steps=10, eta=1.0), FIXED, with_variance)
    other = images(DDPM(steps=10), FIXED, with_variance)
    # DDPM takes the variance of its second step for the first, which draws nothing.
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize("process", [FLOW, BACK], ids=["noise_at_1", "data_at_1"])
def test_a_flow_by_euler_with_guidance_is_a_loop(process):
    """Four steps, two networks of which one has the null label, all channels."""
    sign = 1 if process is FLOW else -1

    def network(label):
        def predict(x, time):
            t = process.noise_time(time)[:, None, None, None]
            v = 0.5 * x - label * (1 + t)
            return sign * jnp.concatenate([v, 100 + v], axis=-1)

        return predict

    ask = samplers.sample(
        Euler(steps=4),
        *(guidance.ClassifierFree(scale=7.0), process),
        *(network(0.3), network(0.1), jnp.asarray(NOISE), KEY),
    )
    z = NOISE.astype(np.float64)
    for i in (4, 3, 2, 1):
        null, kept = (0.5 * z - label * (1 + i / 4) for label in (0.1, 0.3))
        z = z - (null + 7 * (kept - null)) / 4
    np.testing.assert_allclose(ask.images, z, atol=1e-4)
    assert int(ask.evaluations) == 8


def test_the_loss_of_a_flow_with_given_time_and_noise():
    from moe_jax.diffusion import losses

    x0, eps = slow.images(seed=1), slow.images(seed=2)
    time = jnp.array([0.25, 0.8])
    t = np.array([0.25, 0.8])[:, None, None, None]
    z = FLOW.add_noise(x0, eps, time)
    np.testing.assert_allclose(z, (1 - t) * x0 + t * eps, atol=1e-6)
    wide = jnp.concatenate([0.7 * z, 50 * z], axis=-1)  # What is learned of variance.
    found = losses.mse(wide, FLOW.target(x0, eps, time))
    want = ((eps - x0 - 0.7 * np.asarray(z)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("process", [FIXED, FLOW], ids=["schedule", "flow"])
def test_methods_of_first_order_are_ddim(process):
    def denoise(x, time):
        return 0.5 * x + 0.1 * time[:, None, None, None] ** 0.3

    want = images(DDIM(steps=6), process, denoise)
    for other in (Euler(steps=6), DEIS(steps=6, order=0)):
        found = images(other, process, denoise)
        np.testing.assert_allclose(found, want, atol=3e-5 * np.abs(want).max())


def test_two_steps_of_dpm_solver_are_ddim():
    # The first and the last step are of first order.
    one, other = (
        images(o, FLOW, lambda x, t: x**2)
        for o in (DPMSolverPP(steps=2), DDIM(steps=2))
    )
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_dpm_solver_is_a_loop():
    found = images(DPMSolverPP(steps=4), FIXED, epsilon)
    x, before, last_h = NOISE.astype(np.float64), None, None
    indices = [999, 666, 333, 0, None]
    for step in range(4):
        bar = BARS[indices[step]]
        after = 1.0 if step == 3 else BARS[indices[step + 1]]
        eps = epsilon(x, indices[step])
        x0 = (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)
        if step == 3:
            x = x0
            break
        h = 0.5 * np.log(after / (1 - after)) - 0.5 * np.log(bar / (1 - bar))
        reach = np.sqrt(after) * np.expm1(-h)
        x = np.sqrt((1 - after) / (1 - bar)) * x - reach * x0
        if before is not None:
            x = x - 0.5 * reach * (x0 - before) * h / last_h
        before, last_h = x0, h
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4 * np.abs(x).max())


@pytest.mark.parametrize(
    "options", [Heun(steps=5, shift=3.0), DPMSolverPP(steps=5), DEIS(steps=5)]
)
def test_both_directions_give_the_same_images(options):
    def denoise(x, time):
        return 0.3 * BACK.noise_time(time)[:, None, None, None] - x

    want = images(options, FLOW, lambda x, t: x - 0.3 * t[:, None, None, None])
    np.testing.assert_allclose(images(options, BACK, denoise), want, atol=2e-5)


def test_the_mesh_does_not_matter(axes_mesh):
    options, process = DDPM(steps=5), LEARNED
    x = slow.images((8, 3, 3, 2))
    sharding = NamedSharding(axes_mesh(data=8), PartitionSpec("data"))
    split = jax.device_put(x, sharding)
    want = images(options, process, with_variance, x)
    ask = jax.jit(
        lambda x: samplers.sample(
            options,
            guidance.ClassifierFree(scale=2.0, low=0.4),
            *(process, with_variance, with_variance, x, KEY),
        )
    )
    np.testing.assert_allclose(ask(split).images, want, atol=1e-4 * np.abs(want).max())


def test_the_index_of_training_is_what_the_network_is_asked_with():
    asked = []

    def denoise(x, time):
        jax.debug.callback(lambda t: asked.append(int(t)), time[0])
        return x

    found = images(DDPM(steps=4), FIXED, denoise)
    assert np.isfinite(found).all()
    jax.effects_barrier()
    assert sorted(asked) == [0, 333, 666, 999]


@pytest.mark.parametrize(
    ("options", "process", "said"),
    [
        (DDPM(), FLOW, "a flow has no table"),
        (DDIM(steps=0), FLOW, "DDIM.steps=0"),
        (DDIM(eta=1.1), FLOW, "DDIM.eta=1.1"),
        (DEIS(order=4), FLOW, "DEIS.order=4"),
        (Euler(spacing="odd"), FLOW, "Euler.spacing='odd'"),
        (Euler(shift=0.0), FLOW, "Euler.shift=0"),
        (Euler(spacing="ddim"), FLOW, "a flow takes 'even'"),
        (Heun(steps=1001), FIXED, "respacing '1001'"),
        (DDPM(shift=3.0), FIXED, "shift=3"),
        (DDPM(), LEARNED, "gives 2 channels for images of 2; it takes 4"),
    ],
)
def test_samplers_that_are_refused(options, process, said):
    with pytest.raises(UserError, match=said):
        images(options, process, lambda x, time: x)


@pytest.mark.parametrize("options", list(samplers.SAMPLERS))
def test_every_sampler_is_a_config(options):
    assert issubclass(options, config.SamplerConfig)
    assert list(options().problems("p", config.Config())) == []
