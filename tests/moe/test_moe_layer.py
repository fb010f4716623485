"""The MoE layer alone, on a mesh, with padding and with shared experts."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

from moe_jax import config
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.einsum import Einsum
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.moe.dispatch.ragged import Ragged
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE, MoELayer
from moe_jax.moe.routing import EVAL, Mode, Override
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.module import Template

pytestmark = pytest.mark.usefixtures("quick_compilation")

D, F, E, B, S = 16, 24, 8, 8, 8


def options(**fields):
    fields = {
        "num_experts": E,
        "experts": ExpertFeedForward(d_ff=F),
        "scorer": Linear(init_std=0.5, dtype="float64"),
        "shared_d_ff": 12,
        **fields,
    }
    return MoE(**fields)


def template(moe):
    build = lambda rngs: MoELayer(
        D, moe, rngs=rngs, std=0.3, out_std=0.3, dtype="float64"
    )
    return Template(build)


def drawn(made, seed):
    """Weights by numpy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(made.init, jax.random.key(0))
    return jax.tree.map(lambda a: rng.normal(size=a.shape) * 0.4, shapes)


def expected(params, x, valid, top_k=2):
    """The layer in numpy: softmax, top-k, renormalised, experts, shared expert."""
    params = jax.tree.map(np.asarray, params)
    y, counts = np.zeros(x.shape), np.zeros(E, int)
    shared = {name: w[None] for name, w in params["shared"].items()}
    for place in np.argwhere(valid):
        row = x[tuple(place)]
        scores = np.exp(row @ params["scorer"]["w"])
        chosen = np.argsort(-scores, kind="stable")[:top_k]
        for e in chosen:
            share = scores[e] / scores[chosen].sum()
            y[tuple(place)] += share * oracles.expert(params["experts"], e, row)
            counts[e] += 1
        gate = 1.0
        if "shared_gate" in params:
            gate = oracles.sigmoid(row @ params["shared_gate"][:, 0])
        y[tuple(place)] += gate * oracles.expert(shared, 0, row)
    return y, counts


VALID = np.ones((B, S), bool)
VALID[1, 3:] = False
VALID[5:7] = False


def compiled(moe):
    """y, aux and the gradient of a sum over y, the same program with every mesh."""
    with jax.enable_x64(True):
        made = template(moe)

    @jax.jit
    def value(params, x, valid):
        def objective(params, x):
            y, carry, aux = made.bind(params)(x, valid=valid)
            assert carry is None
            target = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            return jnp.sum(y * target) + sum(aux.losses.values()), (y, aux)

        return jax.grad(objective, (0, 1), has_aux=True)(params, x)

    params = drawn(made, seed=1)
    x = np.random.default_rng(0).normal(size=(B, S, D))
    return value, params, x


@pytest.fixture(scope="module")
def run():
    return compiled(options())


def test_outputs_and_counts_match_numpy(float64, run):
    value, params, x = run
    dirty = np.where(VALID[..., None], x, 1e3)
    for valid, rows in ((np.ones((B, S), bool), x), (VALID, x), (VALID, dirty)):
        _, (y, aux) = value(params, rows, valid)
        want, counts = expected(params, rows, valid)
        np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-10)
        np.testing.assert_array_equal(aux.health["counts"], counts)
        np.testing.assert_array_equal(aux.observation.sums["assignments"], counts)
        assert aux.observation.count == valid.sum()
        assert aux.stats.assignments == 2 * valid.sum()
        assert aux.stats.dropped == 0
        assert aux.routing is None


def test_padding_has_zero_output_and_no_gradient(float64, run):
    value, params, x = run
    grads, (y, aux) = value(params, x, VALID)
    assert np.all(np.asarray(y)[~VALID] == 0)
    assert np.all(np.asarray(grads[1])[~VALID] == 0)
    dirty = np.where(VALID[..., None], x, 1e3)
    other_grads, (_, other) = value(params, dirty, VALID)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        (grads, aux.losses),
        (other_grads, other.losses),
    )


def test_a_mesh_with_a_context_axis_changes_nothing(float64, run, axes_mesh):
    value, params, x = run
    want = value(params, x, VALID)
    with jax.set_mesh(axes_mesh(data=2, expert=2, context=2)):
        found = value(params, x, VALID)
    (want_grads, (want_y, want_aux)), (grads, (y, aux)) = want, found
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10),
        (grads, y, aux.losses, aux.health, aux.observation),
        (want_grads, want_y, want_aux.losses, want_aux.health, want_aux.observation),
    )
    assert aux.stats.assignments == want_aux.stats.assignments
    assert len(y.sharding.device_set) == 8


TWO = ("expert", "tensor")


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        (
            dict(data=2, expert=2, tensor=2),
            dict(dispatch=Ragged(), expert_axes=TWO, shared_gate=True),
        ),
        (dict(fsdp=2, expert=2, tensor=2), dict(dispatch=Gather(), bias=True)),
        (
            dict(fsdp=2, expert=2, context=2),
            dict(dispatch=Exact(), expert_axes=("fsdp", "expert"), shared_gate=True),
        ),
        (dict(data=2, expert=4), dict(dispatch=Auto(), bias=True, shared_gate=True)),
        (
            dict(expert=2, context=2, tensor=2),
            dict(dispatch=Einsum(capacity_factor=8.0), expert_axes=TWO, bias=True),
        ),
    ],
    ids=lambda v: "-".join(v) if "dispatch" not in v else type(v["dispatch"]).__name__,
)
def test_whole_layers_on_meshes(float64, axes_mesh, sizes, fields):
    """Each against numpy, and its gradients against those without a mesh."""
    fields = dict(fields)
    experts = ExpertFeedForward(d_ff=F, bias=fields.pop("bias", False))
    value, params, x = compiled(options(experts=experts, **fields))
    want_grads, (want_y, want_aux) = value(params, x, VALID)
    slow, counts = expected(params, x, VALID)
    np.testing.assert_allclose(want_y, slow, rtol=1e-9, atol=1e-10)
    with jax.set_mesh(axes_mesh(**sizes)):
        grads, (y, aux) = value(params, x, VALID)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10),
        (grads, y, aux.losses),
        (want_grads, want_y, want_aux.losses),
    )
    np.testing.assert_array_equal(aux.health["counts"], counts)
    assert aux.stats.assignments == want_aux.stats.assignments == counts.sum()
    assert aux.stats.dropped == 0


def test_the_layer_is_usable_alone():
    """As a library: a layer, an array, nothing else."""
    layer = MoELayer(64, MoE(num_experts=8), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 64)), jnp.float32)
    y, carry, aux = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype and carry is None
    assert float(jnp.abs(y).max()) > 0
    assert int(aux.health["counts"].sum()) == 2 * 3 * 2
    assert set(aux.losses) == {"load_balance_loss", "router_z_loss"}
    # What the caller may add: a routing to capture, a bias, pruned experts.
    mask = jnp.arange(8) < 4
    _, _, aux = layer(
        x,
        mode=Mode(train=False, capture=True),
        router_state={"bias": jnp.where(jnp.arange(8) == 2, 9.0, 0.0)},
        override=Override(expert_mask=mask),
    )
    assert np.all(np.asarray(aux.routing.expert_tk)[:, 0] == 2)
    assert np.asarray(aux.health["counts"])[4:].sum() == 0


def test_a_replayed_routing_gives_the_same_output(float64):
    made = template(options(shared_d_ff=0, dispatch=Bucket(capacity_factor=8.0)))
    params = drawn(made, seed=2)
    layer = made.bind(jax.tree.map(jnp.asarray, params))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, D)))
    capture = Mode(train=False, capture=True)
    y, _, aux = layer(x, mode=capture)
    routing = aux.routing
    turned = Override(
        expert_tk=routing.expert_tk[:, ::-1], valid_tk=routing.valid_tk[:, ::-1]
    )
    again, _, _ = layer(x, mode=EVAL, override=turned)
    np.testing.assert_allclose(again, y, rtol=1e-12, atol=1e-14)
    half = Override(
        expert_tk=routing.expert_tk,
        valid_tk=routing.valid_tk.at[:, 1].set(False),
    )
    first, _, aux = layer(x, mode=EVAL, override=half)
    share = np.asarray(routing.weight_tk)[:, 0]
    for t in range(8):
        want = oracles.expert(
            params["experts"],
            int(routing.expert_tk[t, 0]),
            np.asarray(x).reshape(8, D)[t],
        )
        got = np.asarray(first).reshape(8, D)[t]
        np.testing.assert_allclose(got, share[t] * want, rtol=1e-9, atol=1e-12)
    assert aux.stats.assignments == 8


def test_router_state_only_with_a_bias_rate(float64):
    zeros = jax.tree.map(jnp.zeros_like, drawn(template(options()), seed=0))
    assert template(options()).bind(zeros).init_router_state() == {}
    biased = template(options(balance=Balance(bias_rate=0.1)))
    state = biased.bind(zeros).init_router_state()
    np.testing.assert_array_equal(state["bias"], np.zeros(E))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(num_experts=0), "num_experts=0: must be at least 1"),
        (dict(num_experts=6), "not divisible by config.mesh.expert=4"),
        (dict(selector=TopK(top_k=9)), "selector.top_k=9 is more than"),
        (dict(shared_d_ff=7), "config.ff.shared_d_ff=7 is not divisible"),
        (dict(first_dense=1), "the dense blocks"),
        (dict(every=2), "the dense blocks"),
        (dict(dense_d_ff=8), "would be ignored"),
        (dict(every=2, dense_d_ff=7), "config.ff.dense_d_ff=7 is not divisible"),
        (dict(every=0), "every=0: must be at least 1"),
        (dict(shared_gate=True), "shared_gate=True would be ignored"),
        (dict(shared_gate=True, shared_d_ff=8), ""),
        (dict(expert_axes=("tensor",)), "must hold 'expert'"),
        (dict(expert_axes=("expert", "expert")), "at most once"),
        (dict(expert_axes=("expert", "model")), "must hold 'expert', and others of"),
        (dict(expert_axes=("expert", "data")), "set config.mesh.data to a number"),
        (dict(expert_axes=TWO), ""),
        (
            dict(expert_axes=TWO, num_experts=12),
            "not divisible by config.mesh.expert * config.mesh.tensor=8",
        ),
        (dict(every=2, dense_d_ff=8), ""),
        ({}, ""),
    ],
)
def test_problems(fields, words):
    root = config.Config(mesh=config.MeshConfig(expert=4, tensor=2))
    found = list(MoE(**{"num_experts": 8, **fields}).problems("config.ff", root))
    if words:
        assert any(words in problem for problem in found), found
    else:
        assert found == []
