"""Routers of diffusion transformers in the layer: the same on meshes and dispatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.ragged import Ragged
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE, MoELayer
from moe_jax.moe.routing import EVAL, TRAIN, Condition
from moe_jax.moe.scorers.cosine import Cosine
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.scorers.mlp import MLP
from moe_jax.moe.selectors import STATES
from moe_jax.moe.selectors.diff_moe import DiffMoE
from moe_jax.moe.selectors.global_top_k import GlobalTopK
from moe_jax.moe.selectors.pro_moe import ProMoE, ProMoEChoice
from moe_jax.nn.module import Template

D, E, B, S = 8, 4, 8, 4
COSINE = Cosine(proj_dim=0, temperature=1.0, learned=False, dtype="float64")
LINEAR = Linear(dtype="float64")
# Selector, scorer; the balance of one has a bias beside the selector's state.
ROUTERS = {
    "ProMoE": (ProMoE(top_k=2), COSINE),
    "ProMoE choice": (ProMoEChoice(capacity_factor=1.5), COSINE),
    "DiffMoE": (DiffMoE(dtype="float64"), LINEAR),
    "Race": (
        GlobalTopK(
            k_max=E, score="identity", threshold_decay=0.9, similarity_weight=1.0
        ),
        MLP(hidden=D, dtype="float64"),
    ),
}
BALANCES = {
    "ProMoE": Balance(bias_rate=0.1),
    "Race": Balance(load_balance_weight=0.0, bias_rate=0.1),
}
VALID = np.broadcast_to(np.arange(B)[:, None] != 5, (B, S))


pytestmark = pytest.mark.usefixtures("quick_compilation")


def compiled(name, dispatch):
    """Training (outputs, aux, gradients) and evaluation with a state that is given."""
    selector, scorer = ROUTERS[name]
    moe = MoE(
        num_experts=E,
        experts=ExpertFeedForward(d_ff=8),
        scorer=scorer,
        selector=selector,
        balance=BALANCES.get(name, Balance(load_balance_weight=0.0)),
        dispatch=dispatch,
    )
    made = Template(lambda rngs: MoELayer(D, moe, rngs=rngs, dtype="float64"))
    zeros = jnp.zeros((B, S, 1))
    none = jnp.broadcast_to(jnp.arange(B)[:, None] % 3 == 1, (B, S))
    told = Condition(
        time=zeros[..., 0], time_embedding=zeros, embedding=zeros, none=none
    )

    @jax.jit
    def run(params, x, state):
        def total(params, x, mode):
            layer = made.bind(params)
            given = dict(condition=told, router_state=state, mode=mode)
            y, _, aux = layer(x, valid=VALID, **given)
            target = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            aux = dataclasses.replace(aux, stats=aux.stats.assignments)
            return jnp.sum(y * target) + sum(aux.losses.values()), (y, aux)

        trained = jax.grad(total, (0, 1), has_aux=True)(params, x, TRAIN)
        if type(selector) not in STATES:
            return trained, None
        return trained, total(params, x, EVAL)[1][0]

    shapes = jax.eval_shape(made.init, jax.random.key(0))
    rng = np.random.default_rng(6)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape) * 0.5, shapes)
    state = MoELayer.init_router_state(type("Bare", (), {"options": moe}))
    state = {n: np.full(a.shape, 0.3, "f4") for n, a in state.items()}
    return run, (params, rng.normal(size=(B, S, D)), state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_the_same_on_a_mesh_with_another_dispatch(float64, axes_mesh, name):
    run, given = compiled(name, Ragged())
    want = run(*given)
    (grads, (y, aux)), evaluated = want
    assert np.all(np.asarray(y)[~VALID] == 0) and aux.stats > 0
    routed = ROUTERS[name][0].num_routed(E)
    assert aux.observation.sums["assignments"].shape == (routed,)
    assert evaluated is None or np.abs(evaluated).max() > 0.1
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(grad).max() > 1e-6, path
    run, _ = compiled(name, Exact(capacity_factor=0.5))
    with jax.set_mesh(axes_mesh(data=2, expert=2, context=2)):
        found = run(*given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), found, want
    )
