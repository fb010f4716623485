"""Continuous routers through the layer: against numpy, on meshes, with padding."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import router_oracles

from moe_jax.errors import UserError
from moe_jax.moe.balance import Balance
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE, MoELayer
from moe_jax.moe.routing import Mixing, Mode, Override
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors.mixture_of_tokens import MixtureOfTokens
from moe_jax.moe.selectors.soft_moe import SoftMoE
from moe_jax.nn.module import Template

D, F, E, B, S = 6, 8, 4, 16, 8
CASES = {
    "soft": SoftMoE(slots_per_expert=2),
    "rows": MixtureOfTokens(group_size=2),
    "positions": MixtureOfTokens(group_size=2, across="positions", emit="softmax"),
}
VALID = np.ones((B, S), bool)
VALID[1, 3:] = False
VALID[6:8, 2] = False  # A whole group of the rows.
VALID[5] = False


def template(selector):
    moe = MoE(
        num_experts=E,
        experts=ExpertFeedForward(d_ff=F),
        scorer=Linear(init_std=0.5, dtype="float64"),
        selector=selector,
        balance=Balance(load_balance_weight=0, z_weight=0.5, importance_weight=0.25),
    )
    build = lambda rngs: MoELayer(
        D, moe, rngs=rngs, std=0.3, out_std=0.3, dtype="float64"
    )
    return Template(build)


def drawn(made, dtype):
    """Weights by numpy, which compiles nothing."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(made.init, jax.random.key(0))
    return jax.tree.map(
        lambda a: (rng.normal(size=a.shape) * 0.4).astype(dtype), shapes
    )


def single(made):
    return jax.tree.map(jnp.asarray, drawn(made, np.float32))


def expected(selector, params, x, valid):
    params = jax.tree.map(np.asarray, params)
    flat, valid = x.reshape(-1, D), valid.ravel()
    logits = flat @ params["scorer"]["w"]
    soft = isinstance(selector, SoftMoE)
    oracle = router_oracles.soft_moe if soft else router_oracles.mixture_of_tokens
    merge, emit = oracle(selector, logits, valid, (B, S))
    groups = router_oracles.groups_of_mixing(selector, (B, S))
    expert = lambda e, row: oracles.expert(params["experts"], e, row)
    y = router_oracles.mixed(expert, merge, emit, flat, groups)
    z = np.log(np.exp(logits[valid]).sum(axis=1)) ** 2
    share = emit.sum(axis=2)[valid]
    summed = (share / share.sum(axis=1, keepdims=True)).sum(axis=0)
    losses = {
        "router_z_loss": 0.5 * z.mean(),
        "importance_loss": 0.25 * summed.var() / summed.mean() ** 2,
    }
    return y.reshape(x.shape), losses


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    """y, aux and gradients of a sum over y and the losses, with every mesh."""
    selector = CASES[request.param]
    made = template(selector)
    params = drawn(made, np.float64)

    @jax.jit
    def value(params, x, valid):
        def objective(params, x):
            y, _, aux = made.bind(params)(x, valid=valid)
            target = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            return jnp.sum(y * target) + sum(aux.losses.values()), (y, aux)

        return jax.grad(objective, (0, 1), has_aux=True)(params, x)

    x = np.random.default_rng(0).normal(size=(B, S, D))
    return selector, value, params, x


def test_outputs_losses_and_gradients_match_numpy(float64, case):
    selector, value, params, x = case
    for valid, rows in ((VALID, x), (VALID, np.where(VALID[..., None], x, 1e3))):
        grads, (y, aux) = value(params, rows, valid)
        want, losses = expected(selector, params, x, valid)
        np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-12)
        assert set(aux.losses) == set(losses)
        for name, loss in losses.items():
            np.testing.assert_allclose(aux.losses[name], loss, rtol=1e-9)
        assert np.all(np.asarray(grads[1])[~VALID] == 0)
    stats = aux.stats
    assert stats.dropped == 0 and stats.rounds == 1
    assert stats.assignments == VALID.sum() * E == aux.health["counts"].sum()
    slots = B * 2 if isinstance(selector, SoftMoE) else B * S // selector.group_size
    assert stats.capacity == stats.peak_fill == slots
    target = np.cos(np.arange(x.size)).reshape(x.shape)

    def total(params, x):
        y, losses = expected(selector, params, x, VALID)
        return (y * target).sum() + sum(losses.values())

    step, rng = 1e-6, np.random.default_rng(1)
    named = [("scorer", "w"), ("experts", "w_up"), ("experts", "w_down")]
    for room, name in named:
        grad = np.asarray(grads[0][room][name])
        place = tuple(rng.integers(0, grad.shape))
        ends = []
        for sign in (1, -1):
            moved = jax.tree.map(np.array, params)
            moved[room][name][place] += sign * step
            ends.append(total(moved, x))
        np.testing.assert_allclose(
            grad[place], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8
        )
    nudge = np.zeros(x.shape)
    nudge[0, 1, 2] = step
    want = (total(params, x + nudge) - total(params, x - nudge)) / (2 * step)
    np.testing.assert_allclose(grads[1][0, 1, 2], want, rtol=1e-6, atol=1e-8)


MESHES = [
    dict(data=2, expert=4),
    dict(fsdp=2, expert=2, tensor=2),
    dict(expert=2, context=4),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_same_on_every_mesh(float64, case, axes_mesh, sizes):
    _, value, params, x = case
    want = value(params, x, VALID)
    with jax.set_mesh(axes_mesh(**sizes)):
        found = value(params, x, VALID)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    jax.tree.map(close, found, want)
    assert len(found[1][0].sharding.device_set) == 8


def test_slots_that_the_sequence_shards_cannot_divide(axes_mesh):
    """Three slots of an expert over four shards of the sequence."""
    made = template(SoftMoE(slots_per_expert=3))
    params = single(made)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, S, D)), jnp.float32)
    run = jax.jit(lambda params, x: made.bind(params)(x)[0])
    want = run(params, x)
    with jax.set_mesh(axes_mesh(expert=2, context=4)):
        found = run(params, x)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


GROUP_OF_2_1 = {
    "soft": np.s_[2],
    "rows": np.s_[2:4, 1],
    "positions": np.s_[2, 0:2],
}


def test_perturbing_a_row_or_a_position_reaches_its_group_only():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)
    for name, selector in CASES.items():
        made = template(selector)
        run = jax.jit(lambda x, params=single(made), made=made: made.bind(params)(x)[0])
        change = np.asarray(run(x.at[2, 1].add(1.0)) - run(x))
        inside = np.zeros((B, S), bool)
        inside[GROUP_OF_2_1[name]] = True
        np.testing.assert_array_equal(np.abs(change).max(axis=-1) > 0, inside)


def test_by_hand():
    """Equal tokens give slots equal to them; one slot gives all the same output."""
    row = np.random.default_rng(0).normal(size=D).astype(np.float32)
    made = template(SoftMoE())
    params = single(made)
    x = jnp.broadcast_to(row, (2, S, D))
    capture = Mode(train=False, capture=True)
    y, _, aux = jax.jit(lambda x: made.bind(params)(x, mode=capture))(x)
    mixing = aux.routing
    assert isinstance(mixing, Mixing)
    np.testing.assert_allclose(
        mixing.merge_tep, np.full((2 * S, E, 1), 1 / S), rtol=1e-6
    )
    share = np.asarray(mixing.emit_tep)[0, :, 0]
    weights = jax.tree.map(np.asarray, params)["experts"]
    want = sum(share[e] * oracles.expert(weights, e, row) for e in range(E))
    np.testing.assert_allclose(y, np.broadcast_to(want, y.shape), rtol=1e-5, atol=1e-6)
    # A group of one token: every expert serves it with weight 1.
    made = template(MixtureOfTokens(group_size=1))
    y = jax.jit(lambda x: made.bind(params)(x)[0])(x)
    want = sum(oracles.expert(weights, e, row) for e in range(E))
    np.testing.assert_allclose(y, np.broadcast_to(want, y.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(CASES))
def test_pruned_experts_give_nothing(name):
    override = Override(expert_mask=jnp.arange(E) != 2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)
    made = template(CASES[name])
    params = single(made)
    run = jax.jit(lambda params: made.bind(params)(x, override=override)[0])
    outputs = []
    for value in (1e3, 0.0):
        w_down = params["experts"]["w_down"].at[2].set(value)
        changed = {**params, "experts": {**params["experts"], "w_down": w_down}}
        outputs.append(run(changed))
    np.testing.assert_array_equal(*outputs)


def test_a_group_that_does_not_divide_is_refused():
    made = template(MixtureOfTokens(group_size=3))
    layer = made.bind(single(made))
    with pytest.raises(UserError, match="groups 3 rows, but there are 16"):
        layer(jnp.zeros((B, S, D)))


def test_a_group_that_spans_shards_is_refused(axes_mesh):
    made = template(MixtureOfTokens(group_size=4))
    params = jax.eval_shape(made.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((B, S, D), jnp.float32)
    with jax.set_mesh(axes_mesh(data=8)):
        with pytest.raises(
            UserError, match="4 rows x 1 positions, which do not divide"
        ):
            jax.eval_shape(lambda p, x: made.bind(p)(x)[0], params, x)
