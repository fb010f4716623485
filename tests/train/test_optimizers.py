"""Optimizers against numpy, and groups of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import config as config_lib
from moe_jax import models
from moe_jax.errors import UserError
from moe_jax.train import optimizers
from moe_jax.train.optimizers import NO_DECAY, Adafactor, AdamW, ParamGroup
from moe_jax.tree import named_leaves

SHAPES = {
    "block": {"norm": {"scale": (5,)}, "w": (3, 4)},
    "slow": {"w": (2, 2)},
    "still": {"w": (6,), "norm": {"scale": (2,)}},
}
GROUPS = (
    ParamGroup(pattern="^still/", frozen=True),
    ParamGroup(pattern="^slow/", rate=0.1),
    *NO_DECAY,
)
RATES = [0.25, 0.5, 0.75, 1.0, 1.0]


def draw(rng, scale=1.0):
    make = lambda shape: scale * rng.standard_normal(shape).astype(np.float32)
    return jax.tree.map(make, SHAPES, is_leaf=lambda v: isinstance(v, tuple))


def schedule(step):
    return jnp.asarray(RATES)[step]


@pytest.mark.parametrize("momentum_dtype", ["", "bfloat16"])
def test_adamw_as_numpy_does_it(momentum_dtype):
    options = AdamW(
        momentum_dtype=momentum_dtype,
        learning_rate=0.1,
        weight_decay=0.5,
        clip_norm=2.0,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        groups=GROUPS,
    )
    rng = np.random.default_rng(0)
    start = draw(rng)
    params, _ = optimizers.split(options, start)
    optimizer = optimizers.make_optimizer(options, schedule)
    state = optimizer.init(params)
    update_fn = jax.jit(optimizer.update)

    slow = {n: np.float64(v) for n, v in named_leaves(params).items()}
    first = {n: np.zeros_like(v) for n, v in slow.items()}
    second = {n: np.zeros_like(v) for n, v in slow.items()}
    norms = []
    for step, size in enumerate([3.0, 0.01, 0.3, 1.0, 0.1]):
        grads, _ = optimizers.split(options, draw(rng, size))
        updates, state = update_fn(grads, state, params, step=step)
        params = optax.apply_updates(params, updates)

        flat = {n: np.float64(v) for n, v in named_leaves(grads).items()}
        norms.append(np.sqrt(sum(np.sum(g**2) for g in flat.values())))
        for name, g in flat.items():
            g = g * min(1.0, 2.0 / norms[-1])
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            mean = first[name] / (1 - 0.8 ** (step + 1))
            square = second[name] / (1 - 0.9 ** (step + 1))
            update = mean / (np.sqrt(square) + 1e-3)
            if not name.endswith("norm/scale"):
                update = update + 0.5 * slow[name]
            rate = 0.1 * RATES[step] * (0.1 if name.startswith("slow/") else 1.0)
            slow[name] = slow[name] - rate * update
            if momentum_dtype:  # Kept in fewer digits for the next step only.
                kept = first[name].astype(np.float32).astype(jnp.bfloat16)
                first[name] = kept.astype(np.float64)
        for name, value in named_leaves(params).items():
            np.testing.assert_allclose(value, slow[name], rtol=2e-5, atol=1e-6)
    moments = {str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert moments == {"float32", momentum_dtype or "float32"}
    assert min(norms) < 2.0 < max(norms), "both with and without clipping"
    assert sorted(slow) == ["block/norm/scale", "block/w", "slow/w"]


def test_three_steps_are_those_of_torch():
    """At DiT's settings: rate 1e-4, no decay, epsilon 1e-8 outside of the root."""
    torch = pytest.importorskip("torch")
    options = AdamW(
        learning_rate=1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=0.0
    )
    optimizer = optimizers.make_optimizer(options, lambda step: 1.0)
    rng = np.random.default_rng(4)
    start = rng.normal(size=(5, 7)).astype(np.float32)
    params = {"w": jnp.asarray(start)}
    state = optimizer.init(params)
    theirs = torch.nn.Parameter(torch.tensor(start))
    there = torch.optim.AdamW([theirs], lr=1e-4, eps=1e-8, weight_decay=0.0)
    for step, size in enumerate([1.0, 1e-7, 0.1]):  # The second is near epsilon.
        grad = size * rng.normal(size=start.shape).astype(np.float32)
        updates, state = optimizer.update({"w": grad}, state, params, step=step)
        params = optax.apply_updates(params, updates)
        theirs.grad = torch.tensor(grad)
        there.step()
        np.testing.assert_allclose(params["w"], theirs.detach(), rtol=0, atol=1e-6)
    assert np.abs(params["w"] - start).max() > 1e-4


def test_frozen_parameters_have_no_state():
    options = AdamW(groups=GROUPS)
    params, frozen = optimizers.split(options, draw(np.random.default_rng(1)))
    assert sorted(named_leaves(frozen)) == ["still/norm/scale", "still/w"]
    state = optimizers.make_optimizer(options, schedule).init(params)
    names = list(named_leaves(state))
    assert any("block/w" in name for name in names)
    assert not any("still" in name for name in names)


@pytest.mark.parametrize("pattern", ["^still/", "nothing", ".", "w$", "norm"])
def test_merge_is_the_inverse_of_split(pattern):
    options = AdamW(groups=(ParamGroup(pattern=pattern, frozen=True),))
    params = draw(np.random.default_rng(2))
    trainable, frozen = optimizers.split(options, params)
    names = [set(named_leaves(part)) for part in (trainable, frozen)]
    assert not names[0] & names[1]
    merged = optimizers.merge(trainable, frozen)
    # Dicts of JAX have sorted keys: the order of insertion does not count.
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_first_group_that_matches_counts():
    groups = (ParamGroup(pattern="a", rate=2.0), ParamGroup(pattern="a/b", rate=3.0))
    options = AdamW(groups=groups)
    assert optimizers.group_of(options, "a/b").rate == 2.0
    assert optimizers.group_of(options, "c").rate == 1.0


def test_adafactor_first_step_by_hand():
    """At t = 1 the decay is 0: the moments are those of the first gradient."""
    options = Adafactor(
        learning_rate=0.1, weight_decay=0.0, clip_norm=0.0, min_dim=3, groups=()
    )
    optimizer = optimizers.make_optimizer(options, lambda step: 1.0)
    rng = np.random.default_rng(3)
    params = {"w": rng.standard_normal((3, 4)).astype(np.float32)}
    grads = {"w": rng.standard_normal((3, 4)).astype(np.float32)}
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(grads, state, params, step=0)
    square = np.float64(grads["w"]) ** 2
    rows, columns = square.mean(1, keepdims=True), square.mean(0, keepdims=True)
    update = grads["w"] / np.sqrt(rows * columns / rows.mean())
    update /= max(1.0, np.sqrt(np.mean(update**2)))
    np.testing.assert_allclose(updates["w"], -0.1 * update, rtol=1e-4)


def test_adafactor_learns_with_factored_moments():
    options = Adafactor(learning_rate=0.1, weight_decay=0.0, min_dim=8, groups=())
    optimizer = optimizers.make_optimizer(options, lambda step: 1.0)
    target = np.random.default_rng(4).standard_normal((8, 16)).astype(np.float32)
    params = {"w": jnp.zeros((8, 16)), "b": jnp.zeros((16,))}
    loss = lambda p: jnp.sum(jnp.square(p["w"] + p["b"] - target))
    state = optimizer.init(params)
    sizes = {n: v.shape for n, v in named_leaves(state).items()}
    held = {s for n, s in sizes.items() if n.endswith("/w")}
    assert held == {(8,), (16,), (1,)}, "rows, columns, and a stand-in"
    assert (16,) in {s for n, s in sizes.items() if n.endswith("/b")}
    before = float(loss(params))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, step=0)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    assert float(loss(params)) < 0.2 * before


def test_no_decay_is_for_norm_scales_only(tiny):
    ff = tiny.model.feed_forward
    ff.first_dense, ff.dense_d_ff, ff.shared_d_ff = 1, 32, 32
    tiny.model.tie_embeddings = False
    model = models.build(tiny.model)
    shapes = named_leaves(jax.eval_shape(model.init, jax.random.key(0)))
    options = AdamW()
    without = {n for n in shapes if not optimizers.group_of(options, n).decay}
    block = ("attention_norm", "feed_forward_norm", "attention/q_norm")
    block += ("attention/k_norm",)
    expected = {f"segment_{i}/block_0/{n}/scale" for i in (0, 1) for n in block}
    assert without == expected | {"norm/scale"}
    assert len(shapes) > len(without) + 10


@pytest.mark.parametrize(
    "options, message",
    [
        (AdamW(learning_rate=0.0), "learning_rate=0.0: must be positive"),
        (AdamW(b2=1.0), "b2=1.0: must lie in [0, 1)"),
        (AdamW(momentum_dtype="int4"), "momentum_dtype='int4': must be one of"),
        (AdamW(clip_norm=-1.0), "clip_norm=-1.0: must not be negative"),
        (Adafactor(decay_rate=1.0), "decay_rate=1.0: must lie in (0, 1)"),
        (
            AdamW(groups=(ParamGroup(pattern="(", rate=2.0),)),
            "groups[0].pattern='(': not a regular expression",
        ),
        (AdamW(groups=(ParamGroup(),)), "groups[0].pattern is empty"),
        (
            AdamW(groups=(ParamGroup(pattern="x", frozen=True, rate=0.5),)),
            "groups[0].rate=0.5 would be ignored: the group is frozen",
        ),
    ],
)
def test_problems(tiny, options, message):
    tiny.optimizer = options
    with pytest.raises(UserError) as error:
        config_lib.validate(tiny)
    assert f"config.optimizer.{message}" in str(error.value)
