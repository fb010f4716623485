"""Dispatches called with a routing from outside, on any mesh."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np

from moe_jax.bench import patterns
from moe_jax.moe import sharded
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.dispatch.einsum import Einsum
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.moe.dispatch.ragged import Ragged
from moe_jax.moe.dispatch.ring import Ring
from moe_jax.moe.experts import EXPERTS
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.routing import Assignments
from moe_jax.nn import module
from moe_jax.parallel import rules

D, F, E = 16, 24, 8

# Room for everything where what has no room is dropped; several rounds elsewhere.
FACTORS = {Bucket: 8.0, Einsum: 8.0} | dict.fromkeys(
    (Exact, Ragged, Gather, Ring), 0.25
)
KINDS = {
    "gated": ExpertFeedForward(d_ff=F),
    "plain": ExpertFeedForward(d_ff=F, activation="relu2", gated=False),
    "bias": ExpertFeedForward(d_ff=F, activation="gelu", bias=True),
    "plain-bias": ExpertFeedForward(d_ff=F, activation="gelu", gated=False, bias=True),
}
ONE = ("expert",)
# Sizes, mesh axes of the experts, shards of the tokens.
MESHES = {
    "alone": ({}, ONE, 1),
    "expert": (dict(expert=8), ONE, 8),
    "data-expert": (dict(data=2, expert=4), ONE, 8),
    "fsdp-expert-tensor": (dict(fsdp=2, expert=2, tensor=2), ONE, 4),
    "expert and tensor": (
        dict(data=2, expert=2, tensor=2),
        ("expert", "tensor"),
        8,
    ),
    "fsdp and expert": (
        dict(fsdp=2, expert=2, context=2),
        ("fsdp", "expert"),
        8,
    ),
}


def options_of(cls, **fields):
    if cls in FACTORS:
        fields = {"capacity_factor": FACTORS[cls], **fields}
    return cls(**fields)


def setting(axes_mesh, name):
    sizes = MESHES[name][0]
    return jax.set_mesh(axes_mesh(**sizes)) if sizes else contextlib.nullcontext()


@functools.cache
def template(kind, expert_axes=ONE, dtype="float64", d_model=D, num_experts=E, d_ff=F):
    options = dataclasses.replace(KINDS[kind], d_ff=d_ff)

    def build(rngs):
        experts = EXPERTS[type(options)](
            d_model, num_experts, options, std=1.0, out_std=1.0, dtype=dtype, rngs=rngs
        )
        module.rename_axes(experts, lambda axis: rules.grouped(axis, expert_axes))
        return experts

    with jax.enable_x64(True):
        return module.Template(build)


def weights_of(kind, seed=0, **shape):
    """Random weights, biases too."""
    made = template(kind, **shape)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(made.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=a.shape) / 4 for n, a in shapes.items()}


def run(options, kind, mesh, weights, x, weight_tk, expert_tk, valid_tk, expected_k):
    """(B, S, D) and the statistics; `num_experts` is that of the weights."""
    expert_axes = MESHES[mesh][1]
    num_experts, d_model = weights["w_up"].shape[:2]
    made = template(kind, expert_axes, d_model=d_model, num_experts=num_experts)
    routing = Assignments(
        expert_tk=expert_tk,
        weight_tk=weight_tk,
        valid_tk=valid_tk,
        num_experts=num_experts,
        expected_k=expected_k,
    )
    return sharded.run(options, made.bind(weights), expert_axes, x, routing)


def differentiated(options, kind, mesh, expected_k):
    """Jitted: `(floats, integers, grad) -> y, gradients of the floats, statistics`.

    The floats are (weights, x, weight_tk), the integers (expert_tk, valid_tk).
    """

    @jax.jit
    def value(floats, integers, grad):
        forward = lambda *given: run(options, kind, mesh, *given, *integers, expected_k)
        y, pull, stats = jax.vjp(forward, *floats, has_aux=True)
        return y, pull(grad), stats

    return value


@functools.cache
def oracle(kind, expected_k):
    """Every expert on every token, without a mesh."""
    return differentiated(DenseDispatch(), kind, "alone", expected_k)


def drawn(kind, rows, length, top_k, seed=0, **shape):
    """Random floats and gradient for B = rows, S = length."""
    rng = np.random.default_rng(seed)
    d_model = shape.get("d_model", D)
    x, grad = rng.normal(size=(2, rows, length, d_model))
    weight_tk = rng.normal(size=(rows * length, top_k))
    return (weights_of(kind, seed, **shape), x, weight_tk), grad


def routings(tokens, top_k, num_experts=E):
    """By name: (expert_tk, valid_tk), with arbitrary entries where not valid."""
    sizes = patterns.Sizes(
        tokens=tokens,
        top_k=top_k,
        num_experts=num_experts,
        token_shards=8,
        expert_shards=4,
    )
    seed = tokens * 10 + top_k
    return {name: patterns.make(name, sizes, seed) for name in patterns.PATTERNS}
