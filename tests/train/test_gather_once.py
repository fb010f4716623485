"""Weights gathered once per step: the same numbers, and fewer gathers."""

import collections
import re

import jax
import jax.extend
import numpy as np
import pytest

from moe_jax.check.rows import random_batch
from moe_jax.check.run import with_dtype
from moe_jax.config import MeshConfig
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.nn.attention.latent import LatentAttention
from moe_jax.parallel import batches
from moe_jax.train import setup, step
from moe_jax.tree import named_leaves

MESHES = [
    dict(data=2, fsdp=2, expert=2),
    pytest.param(dict(fsdp=2, expert=2, tensor=2), marks=pytest.mark.soak),
    pytest.param(dict(fsdp=2, context=2, expert=2), marks=pytest.mark.soak),
    pytest.param(dict(fsdp=8), marks=pytest.mark.soak),
]
PARTS = 4


@pytest.fixture
def varied(tiny):
    """A block with experts and shared ones, an output matrix; four micro-batches."""
    ff = tiny.model.feed_forward
    tiny.model.num_layers, ff.shared_d_ff = 1, 32
    ff.dispatch = Bucket(capacity_factor=4.0)
    tiny.model.remat, tiny.model.tie_embeddings = "full", False
    tiny.train.batch_size, tiny.train.accumulation = 32, PARTS
    return tiny


def gradients(config, batch):
    parts = setup.make_parts(config, jax.devices()[: config.mesh.fixed_devices()])
    run = lambda s, b: step.compute_gradients(config, parts.model, s, b)
    with jax.set_mesh(parts.mesh):
        state = setup.fresh_state(parts)
        placed = batches.put(batch, parts.mesh, config.train.batch_size, 0)
        found = jax.jit(run)(state, placed)
    return parts, found


def compare(config, batch):
    _, want = gradients(config, batch)
    config.train.gather_once = True
    parts, found = gradients(config, batch)
    axes, wholes = map(named_leaves, (parts.shardings.params, parts.model.whole))
    for name, grad in named_leaves(want.grads).items():
        got = named_leaves(found.grads)[name]
        assert np.any(grad), name
        np.testing.assert_allclose(got, grad, rtol=1e-12, atol=1e-14, err_msg=name)
        if wholes[name]:
            assert got.sharding.is_equivalent_to(axes[name], got.ndim), name
    np.testing.assert_allclose(found.loss, want.loss, rtol=1e-13)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_same_gradients(varied, float64, mesh):
    config = with_dtype(varied, "float64")
    config.mesh = MeshConfig(**{"data": 1, **mesh})
    compare(config, random_batch(config, "float64"))


@pytest.mark.soak
def test_frozen_weights_tied_embeddings_and_experts_over_two_axes(varied, float64):
    config = with_dtype(varied, "float64")
    config.mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    config.model.tie_embeddings = True
    # Its loss is that of the whole step, observed in a pass before.
    ff = config.model.feed_forward
    config.model.num_layers, ff.first_dense, ff.dense_d_ff = 2, 1, 32
    ff.balance = Balance(load_balance_weight=0.0, global_weight=0.1)
    ff.dispatch = Exact()
    ff.expert_axes = ("expert", "tensor")
    frozen = type(config.optimizer.groups[0])(pattern="attention/", frozen=True)
    config.optimizer.groups = (frozen, *config.optimizer.groups)
    compare(config, random_batch(config, "float64"))


@pytest.mark.soak
def test_latent_attention_and_further_tokens(varied, float64):
    config = with_dtype(varied, "float64")
    config.mesh = MeshConfig(data=1, fsdp=2, expert=2)
    config.model.qk_norm, config.model.num_kv_heads = "none", 0
    config.model.latent = LatentAttention(
        query_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=8
    )
    config.model.mtp, config.objective.mtp_weight = 1, 0.3
    compare(config, random_batch(config, "float64"))


def gathers_by_shape(config):
    """Executed all-gathers of weights by their result's shape, in a step."""
    parts = setup.make_parts(config, jax.devices()[: config.mesh.fixed_devices()])
    run = lambda s, b: step.compute_gradients(config, parts.model, s, b)
    batch = batches.abstract(
        parts.mesh, config.train.batch_size, config.model.row_shapes(config.data)
    )
    found = collections.Counter()

    def count(jaxpr, times):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "all_gather":
                found[eqn.outvars[0].aval.shape] += times
            more = times * eqn.params.get("length", 1)
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if isinstance(inner, jax.extend.core.Jaxpr):
                        count(inner, more)

    with jax.set_mesh(parts.mesh):
        count(jax.make_jaxpr(run)(parts.abstract, batch).jaxpr, 1)
    return found


def test_no_block_gathers_a_weight(varied):
    varied.mesh = MeshConfig(data=1, fsdp=8)
    up = (32, 32)  # (D, F) of the shared experts.
    before = gathers_by_shape(varied)
    # Three matrices, forward and again, in every micro-batch.
    assert before[up] == 3 * 2 * PARTS
    varied.train.gather_once = True
    after = gathers_by_shape(varied)
    assert up not in after
    assert sum(after.values()) <= sum(before.values()) - before[up]


def test_weights_that_are_kept_in_any_case_are_not_named(varied):
    varied.model.remat, varied.train.gather_once = "attention+weights", True
    (problem,) = varied.model.problems("config.model", varied)
    assert "leave 'weights' out" in problem


def test_gathered_in_the_type_of_the_computation(varied):
    varied.mesh = MeshConfig(data=1, fsdp=8)
    varied.model.dtype, varied.train.gather_once = "bfloat16", True
    parts = setup.make_parts(varied, jax.devices())
    state = parts.abstract
    with jax.set_mesh(parts.mesh):
        run = lambda p: step.module.gathered(p, parts.model)
        text = jax.jit(run).lower(state.params).compile().as_text()
    # A CPU widens what it sends, so only the result tells.
    shape = state.params["segment_0"]["block_0"]["attention"]["w_q"].shape
    dims = ",".join(map(str, shape))
    assert re.search(rf"ROOT.*bf16\[{dims}\]", text)
