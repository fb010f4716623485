"""What a denoiser is told: numbers from the formulas, and the same on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.nn import conditioning, linear, module, norms

RNG = np.random.default_rng(0)


def test_timestep_waves():
    (found,) = conditioning.timestep_waves(jnp.ones(1), 8)
    golden = [0.5403, 0.9950, 0.9999, 1.0, 0.8415, 0.0998, 0.0100, 0.0010]
    np.testing.assert_allclose(found, golden, atol=5e-5)


@pytest.mark.parametrize("width", [8, 256])
def test_timestep_waves_in_single_precision(width):
    """A cosine of 1000 has lost three digits of its angle."""
    times = np.array([0, 1, 0.37, 500, 999])
    half = width // 2
    angles = times[:, None] / 10000 ** (np.arange(half) / half)
    want = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    found = np.asarray(conditioning.timestep_waves(jnp.asarray(times, "f4"), width))
    np.testing.assert_allclose(found[:3], want[:3], atol=1e-6)
    np.testing.assert_allclose(found[3:], want[3:], atol=1e-4)
    with jax.enable_x64(True):
        exact = conditioning.timestep_waves(jnp.asarray(times), width)
    np.testing.assert_allclose(exact, want, atol=1e-11)


def drawn(made):
    """The module with all its weights drawn anew, in double precision."""
    for _, node in nnx.iter_graph(made):
        if isinstance(node, nnx.Param):
            node[...] = jnp.asarray(RNG.normal(size=node[...].shape))
    return made


def silu(x):
    return x / (1 + np.exp(-x))


def two_layers(made, x):
    w = lambda one: (np.asarray(one.w[...]), np.asarray(one.b[...]))
    (w1, b1), (w2, b2) = w(made.first), w(made.second)
    return silu(x @ w1 + b1) @ w2 + b2


def test_the_embedding_of_times(float64):
    rngs = nnx.Rngs(params=0)
    made = drawn(conditioning.TimestepEmbedding(12, dtype="float64", rngs=rngs))
    times = np.array([0.0, 0.5, 999.0])
    want = two_layers(made, np.asarray(conditioning.timestep_waves(jnp.asarray(times))))
    np.testing.assert_allclose(made(jnp.asarray(times), "float64"), want, rtol=1e-11)


@pytest.mark.parametrize("null", [True, False])
def test_the_embedding_of_classes(float64, null):
    rngs = nnx.Rngs(params=0)
    given = dict(null=null, dtype="float64", rngs=rngs)
    made = drawn(conditioning.LabelEmbedding(3, 8, **given))
    table = np.asarray(made.table[...])
    assert table.shape == (3 + null, 8)
    found = np.asarray(made(jnp.asarray([2, 0, 3, 2]), "float64"))
    np.testing.assert_array_equal(found[[0, 1, 3]], table[[2, 0, 2]])
    if null:
        np.testing.assert_array_equal(found[2], table[3])
    else:  # Nothing stands in for a class that is not there.
        assert np.isnan(found[2]).all()


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(expert=4)])
def test_classes_on_meshes(float64, axes_mesh, sizes):
    """Values and gradients; some classes come more than once, in several shards."""
    labels = jnp.asarray([2, 0, 3, 2, 2, 1, 0, 3])
    made = module.Template(
        lambda rngs: conditioning.LabelEmbedding(
            3, 8, null=True, dtype="float64", rngs=rngs
        )
    )
    table = jnp.asarray(RNG.normal(size=(4, 8)))

    def loss(table):
        return jnp.sum(jnp.sin(3 * made.bind({"table": table})(labels, "float64")))

    want = 3 * np.cos(3 * np.asarray(table)) * np.bincount(labels)[:, None]
    with jax.set_mesh(axes_mesh(**sizes)):
        found = jax.jit(jax.grad(loss))(table)
    np.testing.assert_allclose(found, want, rtol=1e-11, atol=1e-13)


def test_vectors_and_their_absence(float64):
    given = dict(dtype="float64", rngs=nnx.Rngs(params=0))
    made = drawn(conditioning.VectorEmbedding(5, 8, null=True, **given))
    x = RNG.normal(size=(3, 5))
    none = jnp.asarray([False, True, False])
    replaced = x.copy()
    replaced[1] = np.asarray(made.null[...])
    found = made(jnp.asarray(x), none, "float64")
    np.testing.assert_allclose(found, two_layers(made, replaced), rtol=1e-11)
    found = made(jnp.asarray(x), None, "float64")
    np.testing.assert_allclose(found, two_layers(made, x), rtol=1e-11)


def test_the_share_of_dropped_conditions():
    """Of 100,000 draws within three deviations."""
    drops = conditioning.dropped(jax.random.key(0), 0.1, (100_000,))
    assert abs(float(drops.mean()) - 0.1) < 3 * np.sqrt(0.09 / 100_000)


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_perturbed_conditions(distribution):
    options = conditioning.Perturbation(strength=2.0, distribution=distribution)
    condition = jnp.asarray(RNG.normal(size=(500, 64)), jnp.float32)
    moved = np.asarray(
        conditioning.perturbed(options, jax.random.key(0), condition) - condition
    )
    size = 2 / 8
    if distribution == "uniform":
        assert 0.99 * size < np.abs(moved).max() <= size * (1 + 1e-5)
        size /= np.sqrt(3)
    assert abs(moved.std() / size - 1) < 0.02 and abs(moved.mean()) < 0.01
    assert conditioning.perturbed(options, None, condition) is condition
    none = conditioning.Perturbation(distribution=distribution)
    assert conditioning.perturbed(none, jax.random.key(0), condition) is condition


def test_perturbations_that_are_refused():
    options = conditioning.Perturbation(strength=-1.0, distribution="laplace")
    found = list(options.problems("p", None))
    assert [f.split("=")[0] for f in found] == ["p.strength", "p.distribution"]


def test_modulation(float64):
    """One matrix of all, in the order in which they are handed out."""
    made = conditioning.Modulation(4, 6, dtype="float64", rngs=nnx.Rngs(params=0))
    zero = made(jnp.ones((2, 4)))
    assert len(zero) == 6 and all(not a.any() and a.shape == (2, 1, 4) for a in zero)
    drawn(made)
    told = RNG.normal(size=(2, 4))
    flat = np.asarray(made.linear.w[...]).reshape(4, 24)
    whole = silu(told) @ flat + np.asarray(made.linear.b[...]).reshape(24)
    found = made(jnp.asarray(told))
    for i, one in enumerate(found):
        np.testing.assert_allclose(one[:, 0], whole[:, 4 * i : 4 * i + 4], rtol=1e-11)
    x = RNG.normal(size=(2, 3, 4))
    want = x * (1 + whole[:, None, 4:8]) + whole[:, None, :4]
    np.testing.assert_allclose(
        conditioning.modulate(jnp.asarray(x), *found[:2]), want, rtol=1e-11
    )


def test_a_norm_without_weights(float64):
    x = RNG.normal(size=(3, 5)) * 1e-3
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norms.standardized(jnp.asarray(x), 1e-6), want, 1e-11)


def test_initial_values():
    made = linear.Affine(
        30, (50,), (None, "embed"), std=module.xavier, dtype="float32",
        rngs=nnx.Rngs(params=0),
    )  # fmt: skip
    bound = np.sqrt(6 / 80)
    w = np.asarray(made.w[...])
    assert 0.99 * bound < np.abs(w).max() <= bound and abs(w.mean()) < 0.01
    np.testing.assert_allclose(w.std(), bound / np.sqrt(3), rtol=0.03)
    assert not made.b[...].any()
    # Of stacked matrices the last two dimensions count.
    stacked = module.xavier(jax.random.key(0), (4, 30, 50))
    assert 0.99 * bound < np.abs(stacked).max() <= bound
