"""What waits in the memory of the host is the same; fake devices have one, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.check.rows import random_batch
from moe_jax.checkpoint.checksums import checksums
from moe_jax.checkpoint.store import Checkpoints
from moe_jax.config import CheckpointConfig, MeshConfig
from moe_jax.errors import UserError
from moe_jax.nn.feedforward import Dense
from moe_jax.parallel import batches, host
from moe_jax.train import setup, turns
from moe_jax.tree import named_leaves


@pytest.fixture
def small(tiny):
    """One dense block on two devices."""
    tiny.model.num_layers, tiny.mesh = 1, MeshConfig(data=1, fsdp=2)
    tiny.model.feed_forward = Dense(d_ff=32)
    return tiny


def steps(config):
    parts = setup.make_parts(config, jax.devices()[:2])
    compiled, state = setup.compile_step(parts), setup.fresh_state(parts)
    rows = batches.put(
        random_batch(config, "float32"), parts.mesh, config.train.batch_size, 0
    )
    for _ in range(2):
        state, metrics = compiled(state, rows)
    assert not metrics["skipped"]
    return parts, state


@pytest.fixture(scope="module")
def plain():
    """What `steps` gives without the host: compiled once."""
    return {}


def plainly(config, plain):
    if not plain:
        plain["state"] = steps(config)[1]
    return plain["state"]


def test_optimizer_state_on_the_host(small, plain, same_bits, tmp_path):
    want = plainly(small, plain)
    small.train.offload_optimizer = True
    parts, found = steps(small)
    arrays, wanted = 0, named_leaves(want)
    for name, leaf in named_leaves(found).items():
        np.testing.assert_allclose(leaf, wanted[name], 1e-3, 1e-5, err_msg=name)
        away = name.startswith("opt_state/") and leaf.ndim
        assert host.is_there(leaf) == bool(away), name
        arrays += bool(away)
        assert leaf.sharding == named_leaves(parts.shardings)[name]
    assert arrays >= 10 and any(np.any(v) for v in jax.tree.leaves(found.opt_state))

    # Its checksums are those of the device; it comes back to the host.
    here = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), found)
    assert checksums(named_leaves(found)) == checksums(named_leaves(here))
    store = Checkpoints(str(tmp_path), CheckpointConfig(every=1))
    assert store.save(2, found, {})
    store.wait()
    restored = store.restore(parts.abstract).state
    store.close()
    assert same_bits(restored, found)
    for name, leaf in named_leaves(restored).items():
        assert leaf.sharding == named_leaves(parts.shardings)[name], name


def test_a_bad_step_changes_nothing_on_the_host(small, same_bits):
    small.train.offload_optimizer, small.optimizer.clip_norm = True, 0.0
    parts = setup.make_parts(small, jax.devices()[:2])
    state = setup.fresh_state(parts)
    held = named_leaves(state.opt_state)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, jnp.nan), state.params)

    @jax.jit
    def run(state, grads, finite):
        return turns.update(parts.optimizer, grads, state, finite, on_host=True)

    with jax.set_mesh(parts.mesh):
        params, opt_state = run(state, grads, False)
        moved, _ = run(state, jax.tree.map(jnp.ones_like, grads), True)
    assert same_bits(params, state.params) and same_bits(opt_state, state.opt_state)
    assert len(held) == len(named_leaves(opt_state))
    for name, leaf in named_leaves(moved).items():
        assert np.any(leaf != named_leaves(state.params)[name]), name


def test_activations_on_the_host(small, plain):
    want = plainly(small, plain)
    small.model.remat = "host:input+host:attention+hidden"
    parts, found = steps(small)
    for name, leaf in named_leaves(found.params).items():
        np.testing.assert_allclose(leaf, named_leaves(want.params)[name], 1e-3, 1e-5)
    # What the heads mixed, and the block's input, go there and come back.
    text = str(setup.trace_step(parts).jaxpr)
    assert "f32<host>[1,8,32,4,8]" in text and "f32<host>[1,8,32,32]" in text


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("train.offload_optimizer", True, "--config.train.offload_optimizer"),
        ("model.remat", "none,host:hidden", "--config.model.remat=none,host:hidden"),
    ],
)
def test_refused_where_there_is_no_such_memory(small, monkeypatch, option, value, word):
    part, name = option.split(".")
    setattr(getattr(small, part), name, value)
    monkeypatch.setattr(host, "KIND", "no_such_memory")
    with pytest.raises(UserError, match=word) as caught:
        setup.make_parts(small, jax.devices()[:2])
    assert "it has ['device'" in str(caught.value)


@pytest.mark.parametrize(
    ("remat", "word"),
    [
        ("attention+host:attention", "on the device and on the host; take one"),
        ("input", "'input' is not known"),
        ("host:inputs", "'host:inputs' is not known"),
        ("host:input+hidden", ""),
    ],
)
def test_problems(small, remat, word):
    small.model.remat = remat
    found = list(small.model.problems("config.model", small))
    assert any(word in one for one in found) if word else not found
