"""Losses, weights and times: published values and float64 references."""

import math

import diffusion_oracles as slow
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.diffusion import losses, posterior, times, weights
from moe_jax.diffusion.processes import make_process
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.errors import UserError


def published(values):
    """128 numbers as two images of 4 channels, 4 by 4, channels first."""
    shaped = np.asarray(values, np.float32).reshape(2, 4, 4, 4)
    return shaped.transpose(0, 2, 3, 1)


X0, NOISE = published(np.linspace(-1, 1, 128)), published(np.sin(np.arange(128)))


@pytest.mark.parametrize(
    ("time", "bits"),
    [([0, 1], [1.9407969, 0.3450179]), ([500, 999], [0.00390926, 0.00746206])],
)
def test_published_losses_of_a_network_that_gives_zero(time, bits):
    process, zero, time = slow.schedule(), jnp.zeros((2, 4, 4, 8)), jnp.array(time)
    x = process.add_noise(X0, NOISE, time)
    np.testing.assert_allclose(
        losses.mse(zero, NOISE), [0.4915786, 0.5068659], rtol=1e-6
    )
    found = losses.vb_bits(process, zero, X0, x, time)
    np.testing.assert_allclose(found, bits, rtol=2e-6)


def vb_by_loops(betas, index, x0, x, prediction):
    """Bits of one image, element by element."""
    channels, bar, total = x.shape[-1], slow.bars_of(betas)[index], 0.0

    def cdf(value):
        inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
        return (1 + math.tanh(inner)) / 2

    for place in np.ndindex(x.shape):
        eps, v = prediction[place], prediction[(*place[:2], channels + place[2])]
        a, b = float(x0[place]), float(x[place])
        guess = (b - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        mean, log_variance = (
            slow.posterior(betas, index, guess, b)[0],
            slow.log_variance_range(betas, index, v),
        )
        if index == 0:
            std = math.exp(log_variance / 2)
            low = 0.0 if a < -0.999 else cdf((a - 1 / 255 - mean) / std)
            high = 1.0 if a > 0.999 else cdf((a + 1 / 255 - mean) / std)
            total -= math.log(max(high - low, 1e-12))
            continue
        true_mean, true_variance = slow.posterior(betas, index, a, b)
        total += 0.5 * (
            log_variance
            - math.log(true_variance)
            - 1
            + (true_variance + (true_mean - mean) ** 2) / math.exp(log_variance)
        )
    return total / x.size / math.log(2)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_bound_equals_a_slow_one(float64, name):
    process = slow.schedule(schedule=name)
    betas = slow.betas_of(name, 1000)
    time = [0, 1, 300, 999]
    x0 = np.clip(slow.images((4, 3, 2, 2)).astype(np.float64), -1, 1)
    eps = slow.images(x0.shape, seed=1).astype(np.float64)
    prediction = 0.3 * slow.images((4, 3, 2, 4), seed=2).astype(np.float64)
    prediction[..., :2] += eps
    x = np.asarray(process.add_noise(x0, eps, jnp.array(time)))
    found = losses.vb_bits(process, jnp.asarray(prediction), x0, x, jnp.array(time))
    want = [
        vb_by_loops(betas, t, x0[i], x[i], prediction[i]) for i, t in enumerate(time)
    ]
    np.testing.assert_allclose(found, want, rtol=1e-8)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_the_bound_trains_the_variance_alone(prediction):
    process = slow.schedule(prediction=prediction)
    time = jnp.array([5, 400])
    x = process.add_noise(X0, NOISE, time)
    given = jnp.asarray(0.1 * slow.images((2, 4, 4, 8)))
    gradient = jax.grad(lambda p: losses.vb_bits(process, p, X0, x, time).sum())(given)
    assert np.all(gradient[..., :4] == 0)
    assert np.all(gradient[..., 4:] != 0)


def test_a_learned_variance_needs_its_channels():
    time = jnp.array([0, 1])
    with pytest.raises(UserError, match="gives 4 channels for images of 4; it takes 8"):
        losses.vb_bits(slow.schedule(), jnp.zeros((2, 4, 4, 4)), X0, X0, time)


def test_log_variances(float64):
    tables = slow.schedule().tables
    betas = slow.betas_of("linear", 1000)
    v = np.linspace(-1.5, 1.5, 6).reshape(1, 1, 2, 3)
    for index in (0, 1, 500, 999):
        found = posterior.log_variance(tables, "learned_range", v, jnp.array([index]))
        want = [slow.log_variance_range(betas, index, one) for one in v.ravel()]
        np.testing.assert_allclose(np.ravel(found), want, rtol=1e-9)
        small = posterior.log_variance(tables, "fixed_small", v, jnp.array([index]))
        np.testing.assert_allclose(small, slow.log_variance_range(betas, index, -1.0))
        large = posterior.log_variance(tables, "fixed_large", v, jnp.array([index]))
        want = (
            math.log(betas[index]) if index else slow.log_variance_range(betas, 1, -1)
        )
        np.testing.assert_allclose(np.ravel(large), want, rtol=1e-9)


def test_the_decoder_shares_out_probability_one(float64):
    levels = np.linspace(-1, 1, 256)
    for mean, std in ((0.3, 0.05), (-0.99, 0.2), (1.2, 0.4)):
        nll = posterior.decoder_nll(levels, jnp.asarray(mean), jnp.log(std**2))
        np.testing.assert_allclose(np.exp(-nll).sum(), 1, atol=1e-9)


def test_bits_per_dimension_of_a_network_that_knows_the_image():
    process = slow.schedule(steps=30, prediction="x0", variance="fixed_small")
    x0 = jnp.asarray(np.clip(0.5 * slow.images(), -0.9, 0.9))
    keys = jax.random.split(jax.random.key(0), 2)
    bits = losses.bits_per_dimension(process, lambda x, t: x0, x0, keys)
    assert bits.terms.shape == (30, 2) and bits.total.shape == (2,)
    np.testing.assert_allclose(bits.terms[1:], 0, atol=1e-6)
    bar = slow.bars_of(slow.betas_of("linear", 30))[-1]
    moments = bar * np.mean(np.asarray(x0) ** 2, axis=(1, 2, 3))
    prior = 0.5 * (moments - bar - math.log(1 - bar)) / math.log(2)
    np.testing.assert_allclose(bits.prior, prior, rtol=1e-4)
    np.testing.assert_allclose(bits.total, bits.terms[0] + bits.prior, rtol=1e-5)
    # Between -1 and 1 the decoder's bin is centred on the image.
    std = math.exp(slow.log_variance_range(slow.betas_of("linear", 30), 0, -1) / 2)
    want = -math.log2(math.erf(1 / 255 / std / math.sqrt(2)))
    np.testing.assert_allclose(bits.terms[0], want, rtol=2e-3)


def test_bits_per_dimension_asks_once_an_index():
    process, asked = slow.schedule(steps=25), []

    def denoise(x, time):
        jax.debug.callback(lambda t: asked.append(int(t)), time[0])
        return jnp.concatenate([x, x], axis=-1)

    x0 = jnp.zeros((1, 2, 2, 1))
    keys = jax.random.split(jax.random.key(0), 1)
    bits = losses.bits_per_dimension(process, denoise, x0, keys)
    jax.block_until_ready(bits)
    jax.effects_barrier()
    assert sorted(asked) == list(range(25))
    np.testing.assert_allclose(bits.total, bits.terms.sum(0) + bits.prior, rtol=1e-6)


def test_the_cosine_term():
    target = jnp.asarray([[[[3.0, 4.0], [1.0, 0.0]]]])
    found = losses.cosine(jnp.asarray([[[[6.0, 8.0], [0.0, 2.0]]]]), target)
    np.testing.assert_allclose(found, [0.5], rtol=1e-6)  # Angles 0 and 90 degrees.
    np.testing.assert_allclose(losses.cosine(-target, target), [2.0], rtol=1e-6)
    wide = jnp.concatenate([target, jnp.ones_like(target)], axis=-1)
    np.testing.assert_allclose(losses.cosine(wide, target), [0.0], atol=1e-6)
    at_zero = jax.grad(lambda p: losses.cosine(p, target).sum())(0 * target)
    np.testing.assert_allclose(at_zero[0, 0, 0], [-30, -40], rtol=1e-5)


def test_uncertainty_is_least_at_the_log_of_the_loss():
    loss = jnp.array([0.2, 3.0])
    at = jnp.log(loss)
    slope = jax.grad(lambda u: losses.uncertainty(loss, u).sum())(at)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    np.testing.assert_allclose(losses.uncertainty(loss, 0.0), loss)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_min_snr_by_its_three_formulas(prediction):
    process = slow.schedule(prediction=prediction)
    time = jnp.array([0, 150, 300, 700, 999])
    bar = np.array(slow.bars_of(slow.betas_of("linear", 1000)))[np.asarray(time)]
    snr = bar / (1 - bar)
    capped = np.minimum(snr, 5.0)
    want = {"epsilon": capped / snr, "x0": capped, "v": capped / (snr + 1)}[prediction]
    found = weights.WEIGHTS[weights.MinSNR](weights.MinSNR(), process, time)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    if prediction == "epsilon":
        np.testing.assert_allclose(np.asarray(found)[snr <= 5], 1, rtol=1e-6)
        assert found[0] < 0.01


def test_min_snr_of_noise_alone_is_one():
    flow = make_process(RectifiedFlow())
    found = weights.WEIGHTS[weights.MinSNR](weights.MinSNR(), flow, jnp.array([1.0]))
    assert found.tolist() == [1.0]


def test_edm2_weighs_what_its_network_predicts_evenly():
    # Its network has the error of x0 over c_out = s d / sqrt(s^2 + d^2).
    flow, time = make_process(RectifiedFlow()), jnp.array([0.2, 0.5, 0.9])
    options = weights.EDM2(data_std=0.5)
    found = weights.WEIGHTS[weights.EDM2](options, flow, time)
    t = np.array([0.2, 0.5, 0.9])
    s = t / (1 - t)
    c_out = s * 0.5 / np.sqrt(s**2 + 0.25)
    np.testing.assert_allclose(found, t**2 / c_out**2, rtol=1e-5)
    ones = weights.WEIGHTS[weights.Constant](weights.Constant(), flow, time)
    assert ones.tolist() == [1, 1, 1]


def test_times_have_the_stated_distributions():
    key, shape = jax.random.key(3), (20000,)
    even = np.asarray(times.draw(times.Uniform(), key, shape))
    assert 0 < even.min() and even.max() < 1
    counts = np.histogram(even, 10, (0, 1))[0]
    assert np.abs(counts - 2000).max() < 4 * math.sqrt(1800)
    normal = np.asarray(times.draw(times.LogitNormal(mean=-0.4, std=1.2), key, shape))
    logits = np.log(normal / (1 - normal))
    assert abs(logits.mean() + 0.4) < 4 * 1.2 / math.sqrt(20000)
    assert abs(logits.std() - 1.2) < 0.03
    middle = np.median(times.draw(times.LogitNormal(), key, shape))
    assert abs(middle - 0.5) < 0.01


def test_shift():
    assert times.shifted(0.5, 3.0) == 0.75
    assert times.shifted(0.3, 1.0) == 0.3
    key = jax.random.key(0)
    plain = np.asarray(times.draw(times.Uniform(), key, (100,)))
    moved = times.draw(times.Uniform(shift=3.0), key, (100,))
    np.testing.assert_allclose(moved, 3 * plain / (1 + 2 * plain), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (times.Uniform(shift=0.0), "p.shift=0.0"),
        (times.LogitNormal(std=0.0), "p.std=0.0"),
        (weights.MinSNR(gamma=0.0), "p.gamma=0.0"),
        (weights.EDM2(data_std=-1.0), "p.data_std=-1.0"),
    ],
)
def test_values_that_are_refused(options, said):
    (problem,) = options.problems("p", config.Config())
    assert problem.startswith(said)
