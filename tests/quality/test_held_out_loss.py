"""The held-out loss of a denoiser that is exact, and draws that know no batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.diffusion import losses
from moe_jax.diffusion.processes import make_process
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.diffusion.processes.variance_preserving import VariancePreserving
from moe_jax.quality import denoising

FLOWS = [RectifiedFlow(), RectifiedFlow(direction="data_at_1")]
PATHS = [
    VariancePreserving(prediction=p, schedule=s)
    for p, s in (("epsilon", "linear"), ("v", "cosine"))
]
STD = 0.6


def images(count, shape=(2, 2, 1), seed=0):
    x = STD * np.random.default_rng(seed).normal(size=(count, *shape))
    return {"images": x.astype(np.float32), "weights": np.ones(count, np.float32)}


def best(process):
    """The expectation of what is predicted, given x, of normal data."""

    def denoise(x, time):
        alpha, sigma = process.levels(time, x)
        gain = 1 / (alpha**2 * STD**2 + sigma**2)
        x0, eps = alpha * STD**2 * gain * x, sigma * gain * x
        return process.target(x0, eps, time)

    return denoise


def best_loss(process, noise_time):
    """The variance of the target given x, per dimension."""
    time = process.from_noise_time(jnp.asarray(noise_time, jnp.float32))
    one = jnp.ones(time.shape)
    alpha, sigma = process.levels(time, one)
    of_x0, of_eps = (
        process.target(one, 0 * one, time),
        process.target(0 * one, one, time),
    )
    variance = of_x0**2 * STD**2 + of_eps**2
    with_x = of_x0 * alpha * STD**2 + of_eps * sigma
    return np.asarray(variance - with_x**2 / (alpha**2 * STD**2 + sigma**2), np.float64)


@pytest.mark.parametrize(
    ("options", "draws"),
    [(FLOWS[0], 10), (FLOWS[1], 4), (PATHS[0], 10), (PATHS[1], 10)],
)
def test_loss_of_the_exact_denoiser(options, draws):
    process, batch = make_process(options), images(2000)

    @jax.jit
    def sums_of(shift):
        denoise = lambda x, time: best(process)(x, time) + shift
        return denoising.loss_sums(
            process, denoise, batch, jnp.arange(2000), draws=draws
        )

    sums = sums_of(0.0)
    fine = best_loss(process, (np.arange(10_000) + 0.5) / 10_000)
    want = fine.reshape(10, 1000).mean(1)
    mean = np.asarray(sums.loss / sums.weight)
    error = np.sqrt((sums.square / sums.weight - mean**2) / sums.weight)
    assert (np.abs(mean - want) < 4 * np.asarray(error) + 1e-6).all()
    assert (np.asarray(error) < 0.06 * want + 1e-6).all()  # it would see a wrong bin
    if draws == 10:
        np.testing.assert_array_equal(sums.weight, 2000)  # each image once in each bin
    assert sums.weight.sum() == 2000 * draws
    wrong = sums_of(0.3)  # worse in every bin
    assert (np.asarray(wrong.loss / wrong.weight) > mean).all()


def capture(seen):
    def denoise(x, time):
        jax.debug.callback(lambda *a: seen.append(tuple(map(np.array, a))), x, time)
        return x

    return denoise


def test_times_stand_evenly():
    process, seen = make_process(RectifiedFlow()), []
    sums = denoising.loss_sums(
        process, capture(seen), images(50), jnp.arange(50), draws=5
    )
    jax.block_until_ready(sums)
    jax.effects_barrier()
    times = np.sort([time for _, time in seen], axis=0)
    np.testing.assert_allclose(np.diff(times, axis=0), 0.2, atol=1e-6)
    assert len(np.unique(times[0])) == 50 and np.ptp(times[0]) > 0.15
    histogram = np.histogram(times, bins=10, range=(0, 1))[0]
    np.testing.assert_array_equal(sums.weight, histogram)


@pytest.mark.parametrize("options", [FLOWS[1], PATHS[0]])
def test_draws_do_not_know_the_batch(options):
    process, batch = make_process(options), images(13)
    sums_of = jax.jit(
        lambda batch, row_b, seed: denoising.loss_sums(
            process, lambda x, time: jnp.sin(3 * x), batch, row_b, seed=seed
        )
    )
    whole = sums_of(batch, jnp.arange(13), 0)
    parts = []
    for begin in (0, 5, 10):  # the last two of fifteen are padding
        rows = np.arange(begin, begin + 5)
        some = {name: v[np.minimum(rows, 12)] for name, v in batch.items()}
        some["weights"] = (rows < 13).astype(np.float32)
        some["images"][rows > 12] = np.nan
        parts.append(sums_of(some, jnp.asarray(rows), 0))
    found = denoising.total(parts)
    assert found.loss.dtype == np.float64
    for name in ("loss", "square", "weight"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(whole, name), rtol=1e-5
        )
    # Rows in another order, and other rows.
    turned = {name: v[::-1] for name, v in batch.items()}
    again = sums_of(turned, jnp.arange(13)[::-1], 0)
    np.testing.assert_allclose(again.loss, whole.loss, rtol=1e-5)
    for row, seed in ((1, 0), (0, 1)):
        other = sums_of(batch, jnp.arange(13) + row, seed)
        assert np.abs(other.loss / whole.loss - 1).max() > 0.01


def test_draws_do_not_know_the_mesh(axes_mesh):
    process, batch = make_process(RectifiedFlow()), images(16)
    sums = jax.jit(
        lambda b, r: denoising.loss_sums(process, lambda x, t: x - 0.1, b, r)
    )
    alone = sums(batch, jnp.arange(16))
    mesh = axes_mesh(data=4)
    split = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        found = sums(*jax.device_put((batch, np.arange(16)), split))
    np.testing.assert_allclose(found.loss, alone.loss, rtol=1e-5)
    np.testing.assert_array_equal(found.weight, alone.weight)


def test_noise_is_fresh_for_rows_and_times():
    process, seen = make_process(RectifiedFlow()), []
    batch = images(3, (8, 8, 1))
    batch["images"][:] = 0
    out = denoising.loss_sums(process, capture(seen), batch, jnp.arange(3), draws=4)
    jax.block_until_ready(out)
    jax.effects_barrier()
    noise = np.concatenate([x / t[:, None, None, None] for x, t in seen])
    alike = np.corrcoef(noise.reshape(12, -1)) - np.eye(12)
    assert np.abs(alike).max() < 0.5 and abs(noise.std() - 1) < 0.1


def test_figures():
    sums = denoising.LossSums(
        loss=np.array([2.0, 12.0]),
        square=np.array([4.0, 80.0]),
        weight=np.array([1, 2]),
    )
    found = denoising.loss_figures(sums)
    assert found["denoising_loss"] == 4 and found["denoising_loss/0-0.5"] == 2
    assert found["denoising_loss/0.5-1"] == 6
    # The variances of the means are 0 and (40 - 36) / 2.
    np.testing.assert_allclose(found["denoising_error"], np.sqrt(2) / 2)
    none = denoising.LossSums(loss=np.zeros(2), square=np.zeros(2), weight=np.zeros(2))
    assert denoising.loss_figures(none) == {} and denoising.total([]) is None


def test_bits_do_not_know_the_batch():
    options = VariancePreserving(steps=25, prediction="x0", variance="fixed_small")
    process, batch = make_process(options), images(6)
    batch["images"] = np.clip(batch["images"], -1, 1)
    denoise = lambda x, time: 0.9 * x
    sums_of = jax.jit(
        lambda batch, row_b: denoising.bit_sums(
            process, denoise, batch, row_b, num_images=5
        )
    )
    parts = [
        sums_of({name: v[rows] for name, v in batch.items()}, jnp.asarray(rows))
        for rows in (np.arange(3), np.arange(3, 6))
    ]
    sums = denoising.total(parts)
    assert sums.weight == 5
    keys = denoising.row_keys(0, jnp.arange(5))
    want = jax.jit(lambda x0: losses.bits_per_dimension(process, denoise, x0, keys))(
        batch["images"][:5]
    )
    found = denoising.bit_figures(sums)
    terms = np.asarray(want.terms).mean(1)
    expected = {
        "bits_per_dimension": np.mean(want.total),
        "bits_per_dimension/prior": np.mean(want.prior),
        "bits_per_dimension/0-0.1": terms[:3].sum(),  # indices 0, 1 and 2 of 25
        "bits_per_dimension/0.9-1": terms[23:].sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(sums.bins.sum() / 5, terms.sum(), rtol=1e-5)
