"""Masks, their loss and routing by time on meshes: the same numbers on each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dit import experts, options
from test_dit_layouts import BATCH, drawn, inputs

from moe_jax.models.dit import DiTModel
from moe_jax.models.dit_config import mlp
from moe_jax.models.dit_fused import dense_model, fuse
from moe_jax.models.masks.switch_dit import SwitchDiT
from moe_jax.models.masks.task_routing import TaskRouting
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.noises.sampled_experts import SampledExperts
from moe_jax.moe.routing import TRAIN
from moe_jax.moe.scorers.timestep import Timestep
from moe_jax.nn import module
from moe_jax.nn.attention.blocked import Blocked
from moe_jax.parallel import rules
from moe_jax.tree import named_leaves


def model_of(name):
    """Switch-DiT's mask before sampled experts by time, or task routing alone."""
    fields = dict(feed_forward=mlp(16), num_layers=1)
    fields["input_mask"] = TaskRouting(beta=0.5)
    if name == "switch":
        scorer, noise = Timestep(dtype="float64"), SampledExperts()
        ff = experts(scorer=scorer, noise=noise, dispatch=DenseDispatch())
        ff.experts.d_ff = ff.shared_d_ff = 16
        mask = SwitchDiT(dtype="float64", prior_steps=30)
        fields = dict(feed_forward=ff, num_layers=2, remat="full", input_mask=mask)
    return DiTModel(options(attention=Blocked(block=8), **fields))


def step(model, params, given, gathered=False):
    """Prediction, counts of the experts, losses; gradients of all of it."""
    state = model.init_router_state()

    def loss(places, params):
        if gathered:
            params = module.slotted(module.gathered(params, model), places)
        else:
            params = places
        key = jax.random.key(11)
        found = model.apply(params, state, given, key=key, mode=TRAIN)
        kept = jnp.where(given.valid[:, None, None, None], found.prediction, 0)
        losses, counts = dict(found.losses), None
        if found.aux is not None:
            losses, counts = losses | found.aux.losses, found.aux.health["counts"]
        total = jnp.sum(jnp.sin(kept)) + 100 * sum(map(jnp.sum, losses.values()))
        return total, (kept, counts, losses)

    places = params
    if gathered:
        places = module.slots(params, model.rounded, model.dtype)
    return jax.jit(jax.grad(loss, has_aux=True))(places, params)


def placed(mesh, model):
    """The weights and the images, split over the mesh."""
    rows = rules.sharding(mesh, ("batch",))
    params = jax.device_put(drawn(model), rules.tree_shardings(mesh, model.axes))
    return params, jax.device_put(inputs(), jax.tree.map(lambda a: rows, inputs()))


@pytest.fixture(scope="module")
def alone():
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, inputs())
        models = {name: model_of(name) for name in ("switch", "DTR")}
        made = {name: step(of, drawn(of), given) for name, of in models.items()}
        return jax.tree.map(np.asarray, made)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, sizes, gathered",
    [
        ("switch", dict(context=2, fsdp=2, expert=2), True),
        ("DTR", dict(context=2, expert=2, tensor=2), False),
    ],
    ids=str,
)
def test_the_same_on_every_mesh(float64, axes_mesh, alone, name, sizes, gathered):
    model, mesh = model_of(name), axes_mesh(**sizes)
    with jax.set_mesh(mesh):
        found = jax.tree.map(np.asarray, step(model, *placed(mesh, model), gathered))
    counts, losses = found[1][1:]
    if name == "switch":
        np.testing.assert_array_equal(counts, alone[name][1][1])
        # Images are drawn for, and not tokens: multiples of their 16 patches.
        assert counts.sum() == 2 * (BATCH - 1) * 16 * 2 and (counts % 16 == 0).all()
        assert "diffusion_prior_loss" in losses
    wanted = named_leaves(alone[name])
    for leaf, value in named_leaves(found).items():
        scale = np.linalg.norm(wanted[leaf])
        assert np.linalg.norm(value - wanted[leaf]) <= 1e-9 * scale + 1e-11, leaf
        assert scale > 1e-6 or leaf.endswith("b_k"), leaf


@pytest.mark.slow
def test_fused_experts_on_a_mesh(float64, axes_mesh):
    """The experts, split, are brought together as a dense model's weights lie."""
    model, mesh = model_of("switch"), axes_mesh(context=2, fsdp=2, expert=2)
    dense, state = dense_model(model), model.init_router_state()
    make = jax.jit(lambda p: fuse(model, p, state, jnp.asarray(500.0)))
    want = named_leaves(make(drawn(model)))
    with jax.set_mesh(mesh):
        made = make(placed(mesh, model)[0])
        where = rules.tree_shardings(mesh, dense.axes)
    found, places = named_leaves(made), named_leaves(where)
    for name, value in found.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-12, err_msg=name)
        if "feed_forward" in name:
            assert value.sharding.is_equivalent_to(places[name], value.ndim), name
