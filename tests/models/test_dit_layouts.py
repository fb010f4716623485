"""The diffusion transformer on meshes: the same prediction, losses and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dit import CLASSES, E, experts, options

from moe_jax.models.base import ImageInputs
from moe_jax.models.dit import DiTModel
from moe_jax.moe.routing import TRAIN
from moe_jax.moe.scorers.linear import Linear
from moe_jax.nn import module
from moe_jax.nn.attention.blocked import Blocked
from moe_jax.parallel import rules
from moe_jax.tree import named_leaves

BATCH, SIDE = 8, 8


@pytest.fixture(scope="module")
def model():
    """Blocks: dense, MoE."""
    ff = experts(
        scorer=Linear(init_std=0.0, dtype="float64"),
        every=2,
        dense_d_ff=64,
    )
    ff.experts.d_ff = ff.shared_d_ff = 16
    made = options(
        feed_forward=ff,
        num_layers=2,
        qk_norm="layer",
        condition_dropout=0.5,
        attention=Blocked(block=8),
    )
    with jax.enable_x64(True):
        return DiTModel(made)


def drawn(model):
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda a: rng.normal(size=a.shape) * 0.3, shapes)


def inputs():
    rng = np.random.default_rng(1)
    return ImageInputs(
        x=rng.normal(size=(BATCH, SIDE, SIDE, 3)),
        time=rng.uniform(0, 999, BATCH),
        label=rng.integers(0, CLASSES, BATCH),
        none=np.arange(BATCH) % 3 == 0,
        valid=np.arange(BATCH) != 5,
    )


def step(model, params, given, gathered=False):
    """Prediction, counts of the experts, balance losses; gradients of all of it.

    With `gathered` weights are brought together first, and gradients come in slots.
    """
    state = model.init_router_state()

    def loss(places, params):
        if gathered:
            params = module.slotted(module.gathered(params, model), places)
        else:
            params = places
        found = model.apply(params, state, given, key=jax.random.key(11), mode=TRAIN)
        found, aux = found.prediction, found.aux
        kept = jnp.where(given.valid[:, None, None, None], found, 0)
        total = jnp.sum(jnp.sin(kept)) + 100 * sum(map(jnp.sum, aux.losses.values()))
        return total, (kept, aux.health["counts"], aux.losses)

    places = params
    if gathered:
        places = module.slots(params, model.rounded, model.dtype)
    return jax.jit(jax.grad(loss, has_aux=True))(places, params)


@pytest.fixture(scope="module")
def alone(model):
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, inputs())
        return jax.tree.map(np.asarray, step(model, drawn(model), given))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, gathered",
    [
        (dict(data=2, fsdp=2, tensor=2), False),
        (dict(data=2, expert=4), True),
        (dict(context=2, expert=2, tensor=2), False),
    ],
    ids=str,
)
def test_the_same_on_every_mesh(float64, axes_mesh, model, alone, sizes, gathered):
    mesh = axes_mesh(**sizes)
    with jax.set_mesh(mesh):
        where = rules.tree_shardings(mesh, model.axes)
        params = jax.device_put(drawn(model), where)
        rows = rules.sharding(mesh, ("batch",))
        given = jax.device_put(inputs(), jax.tree.map(lambda a: rows, inputs()))
        found = jax.tree.map(np.asarray, step(model, params, given, gathered))
    counts = found[1][1]
    np.testing.assert_array_equal(counts, alone[1][1])
    assert counts.shape == (1, E) and counts.sum() == 7 * 16 * 2
    wanted = named_leaves(alone)
    for name, value in named_leaves(found).items():
        want = wanted[name]
        scale = np.linalg.norm(want)
        assert np.linalg.norm(value - want) <= 1e-10 * scale + 1e-11, name
        # Scores of a query that all move alike change nothing.
        assert scale > 1e-6 or name.endswith("k_norm/bias"), name
