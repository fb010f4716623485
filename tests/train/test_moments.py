"""Moments in eight bits: the code by hand, on any mesh, in a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.check.rows import random_batch
from moe_jax.checkpoint.store import Checkpoints
from moe_jax.config import CheckpointConfig
from moe_jax.errors import UserError
from moe_jax.nn.feedforward import Dense
from moe_jax.parallel import batches
from moe_jax.train import moments, optimizers, setup
from moe_jax.train.optimizers import AdamW
from moe_jax.tree import named_leaves

BLOCK = 16
SHAPE = (2, 64, 64)


def drawn(seed=0, sign=True):
    """Numbers of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=SHAPE) * 10.0 ** rng.uniform(-6, 2, SHAPE)
    return (x if sign else np.square(x)).astype(np.float32)


def packed(x, sign, step=3):
    return moments.pack({"w": jnp.asarray(x)}, BLOCK, sign, jnp.int32(step))


def scales(x):
    return np.abs(x).reshape(2, 4, BLOCK, 64).max(2)


@pytest.mark.parametrize("sign", [True, False])
def test_levels_are_neighbours_of_the_number(sign):
    x = drawn(sign=sign)
    kept = packed(x, sign)
    code = np.asarray(kept["code"]["w"], np.int64)
    top, power = (127, 4) if sign else (255, 6)
    assert kept["code"]["w"].dtype == (jnp.int8 if sign else jnp.uint8)
    np.testing.assert_array_equal(kept["scale"]["w"], scales(x))
    assert np.all(np.sign(code) * np.sign(x) >= 0)
    # In float64: the number lies between the levels around the one that was chosen.
    share = np.abs(x.astype(np.float64)) / np.repeat(scales(x), BLOCK, axis=1)
    level = np.abs(code)
    assert level.max() == top and level.min() == (0 if sign else 1)
    low = (np.maximum(level - 1, 0) / top) ** power
    high = ((level + 1) / top) ** power
    assert np.all(low <= share * (1 + 1e-6)) and np.all(share <= high * (1 + 1e-6))
    wide = moments.unpack(kept, {"w": jnp.zeros(SHAPE)})["w"]
    want = np.sign(code) * (level / top) ** power * np.repeat(scales(x), BLOCK, axis=1)
    np.testing.assert_allclose(wide, want, rtol=1e-5)


def test_zeros_stay_zeros_and_no_second_moment_becomes_one():
    x = np.zeros(SHAPE, np.float32)
    x[0, :32] = 1e-17  # A block below any level of its own scale, but for one number.
    x[0, 0] = 1.0
    kept = packed(x, False)
    code = np.asarray(kept["code"]["w"])
    assert code[0, 0].min() == 255 and np.all(code[0, 1:16] == 1)
    assert np.all(code[0, 16:32] == 255) and not code[0, 32:].any()
    assert np.all(np.isfinite(moments.unpack(kept, {"w": x})["w"]))


def test_the_mean_of_many_roundings_is_the_number():
    x = drawn(1)
    one = jax.jit(
        lambda step: moments.unpack(packed(x, True, step), {"w": jnp.zeros(SHAPE)})["w"]
    )
    count = 256
    found = np.mean([one(i) for i in range(count)], axis=0, dtype=np.float64)
    # No rounding is off by more than a step of 4 levels' slope at the number.
    share = np.abs(x) / np.repeat(scales(x), BLOCK, axis=1)
    width = 4 / 127 * np.maximum(share, 127.0**-4) ** 0.75 * 1.1 + 2 * 127.0**-4
    noise = width / 2 / np.sqrt(count) * np.repeat(scales(x), BLOCK, axis=1)
    assert np.abs((found - x) / noise).max() < 6
    assert np.abs(np.mean((found - x) / noise)) < 0.05, "none to one side"
    assert not np.array_equal(one(0), one(1))


def small_model(config):
    """One dense block whose matrices have blocks on any of the meshes."""
    config.model.num_layers, config.model.d_model = 1, 64
    config.model.feed_forward = Dense(d_ff=128)
    config.optimizer = AdamW(
        learning_rate=1e-2,
        momentum_dtype="int8",
        variance_dtype="int8",
        block_size=BLOCK,
    )
    return config


def state_after(config, devices, steps=2):
    parts = setup.make_parts(config, jax.devices()[:devices])
    step, state = setup.compile_step(parts), setup.fresh_state(parts)
    rows = random_batch(config, "float32")
    rows = batches.put(rows, parts.mesh, config.train.batch_size, 0)
    for _ in range(steps):
        state, _ = step(state, rows)
    return parts, state


def test_a_step_on_two_meshes(make_tiny, same_bits, tmp_path):
    states, made = {}, {}
    for devices, mesh in ((1, {}), (4, dict(fsdp=2, tensor=2))):
        config = small_model(make_tiny(**mesh))
        parts, states[devices] = state_after(config, devices)
        made[devices] = parts
    store = Checkpoints(str(tmp_path), CheckpointConfig(every=1))
    assert store.save(2, states[4], {})
    store.wait()
    assert same_bits(store.restore(made[1].abstract).state, states[4])
    store.close()
    codes = {
        name: leaf
        for name, leaf in named_leaves(states[4].opt_state).items()
        if leaf.dtype in (jnp.int8, jnp.uint8)
    }
    # Two moments of q, o, gate, up and down; k and v are small, and no dimension before
    # the last of the embedding's 264 x 64 is a multiple.
    assert len(codes) == 10
    one = named_leaves(states[1].opt_state)
    params = named_leaves(parts.abstract.params)
    for name, code in codes.items():
        (owner,) = (p for n, p in params.items() if name.endswith("code/" + n))
        assert code.sharding.is_equivalent_to(owner.sharding, code.ndim)
        scale = named_leaves(states[4].opt_state)[name.replace("code/", "scale/")]
        assert scale.sharding.is_equivalent_to(owner.sharding, code.ndim)
        assert scale.size * BLOCK == code.size
        # The gradients of two meshes differ in their last digits, which may tip the
        # choice between two neighbours.
        gap = np.abs(np.int64(code) - np.int64(one[name]))
        assert gap.max() <= 1 and np.mean(gap > 0) < 0.02, name


def test_blocks_that_a_mesh_would_cut_are_refused(make_tiny):
    config = small_model(make_tiny(fsdp=8))
    with pytest.raises(UserError, match="block_size=16 does not divide the 8 of 64"):
        setup.make_parts(config, jax.devices())


def test_moments_stay_close_to_adam():
    """Over many steps, of gradients of one size and of very different ones."""
    options = dict(learning_rate=0.1, weight_decay=0.0, clip_norm=0.0, b2=0.99)
    params = {"w": jnp.zeros((64, 64))}
    made = [
        optimizers.make_optimizer(AdamW(**options, **more), lambda step: 1.0)
        for more in ({}, dict(momentum_dtype="int8", variance_dtype="int8"))
    ]
    states = [one.init(params) for one in made]
    updates = [jax.jit(one.update) for one in made]
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-3, 0, (64, 64))
    for step in range(60):
        # After 30 steps hardly any gradient: the moments must decay.
        now = size * (1.0 if step < 30 else 0.05)
        grads = {"w": jnp.asarray(now * (1 + rng.normal(size=size.shape)), jnp.float32)}
        found = []
        for i in range(2):
            moved, states[i] = updates[i](grads, states[i], params, step=step)
            found.append(np.asarray(moved["w"]))
        # Where nothing is lost, the step is as large, up to some per cent of noise.
        gap = np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])
        assert gap < 0.15, step
    wide = moments.unpack(states[1][0].nu, params)["w"]
    ratio = np.asarray(wide / states[0][0].nu["w"])
    assert abs(np.mean(ratio) - 1) < 0.02 and np.std(ratio) < 0.25


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        (dict(momentum_dtype="int8", variance_dtype="int8", block_size=32), ""),
        (dict(variance_dtype="bfloat16"), "must be '' or 'int8'"),
        (dict(block_size=32), "would be ignored"),
        (dict(variance_dtype="int8", block_size=4), "at least 8"),
    ],
)
def test_problems(fields, word):
    found = list(AdamW(**fields).problems("config.optimizer", None))
    assert any(word in one for one in found) if word else not found
