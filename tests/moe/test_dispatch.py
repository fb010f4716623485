"""One suite for every dispatch: a new one is tested by being listed in DISPATCHES."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from moe_jax import config
from moe_jax.moe.dispatch import DISPATCHES, plan
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE, MoELayer
from moe_jax.moe.routing import Routing
from moe_jax.nn.module import Template
from moe_jax.parallel import rules

D, F, E = 16, 24, 8
# Exact needs several rounds for all but the balanced pattern, where there are shards.
FACTORS = {Bucket: 1.5, Exact: 0.25}
MESHES = {
    "alone": ({}, 1),
    "expert": (dict(expert=8), 8),
    "data-expert": (dict(data=2, expert=4), 8),
    "fsdp-expert-tensor": (dict(fsdp=2, expert=2, tensor=2), 4),
}
# Mesh, rows, tokens in a row, K.
CASES = [
    ("alone", 8, 32, 2),
    ("expert", 8, 32, 2),
    ("data-expert", 8, 32, 2),
    ("fsdp-expert-tensor", 8, 32, 2),
    ("alone", 8, 32, 1),
    ("alone", 4, 1, 2),  # Fewer tokens than experts,
    ("expert", 8, 1, 2),  # and one token a shard.
]


def distinct(rng, tokens, top_k, shares):
    return np.stack([rng.choice(E, top_k, False, shares) for _ in range(tokens)])


def patterns(tokens, top_k):
    """By name: (expert_tk, valid_tk), with arbitrary entries where not valid."""
    rng = np.random.default_rng(tokens * 10 + top_k)
    t, k = np.arange(tokens)[:, None], np.arange(top_k)[None]
    balanced = (t + 3 * k) % E
    every = np.ones((tokens, top_k), bool)
    zipf = 1 / np.arange(1, E + 1) ** 1.5
    hollow = np.array([1, 6])[(t + k) % 2]
    some = rng.random((tokens, top_k)) < 0.6
    some[tokens // 8 : tokens // 2] = False  # Whole shards without work.
    same = (3 + k) % E + 0 * t
    found = {
        "balanced": (balanced, every),
        "random": (distinct(rng, tokens, top_k, None), every),
        "zipf": (distinct(rng, tokens, top_k, zipf / zipf.sum()), every),
        "all on one": (same, every & (k == 0)),
        "two in use": (hollow, every),
        "holes": (distinct(rng, tokens, top_k, None), some),
        "uneven halves": (np.where(t < tokens // 2, same, balanced), every),
        "nobody": (balanced, ~every),
    }
    return {n: (e.astype(np.int32), v) for n, (e, v) in found.items()}


def build(cls, dtype="float64"):
    options = MoE(num_experts=E, experts=ExpertFeedForward(d_ff=F), dispatch=cls())
    if hasattr(options.dispatch, "capacity_factor"):
        options.dispatch.capacity_factor = FACTORS.get(cls, 8.0)
    return Template(lambda rngs: MoELayer(D, options, rngs=rngs, dtype=dtype))


def call(template, weights, x, weight_tk, expert_tk, valid_tk):
    """The layer's dispatch with a routing from outside."""
    scorer = {"w": jnp.zeros((D, E), jnp.float32)}
    layer = template.bind({"experts": weights, "scorer": scorer})
    nothing = jnp.zeros((len(expert_tk), E))
    routing = Routing(
        expert_tk=expert_tk,
        weight_tk=weight_tk,
        valid_tk=valid_tk,
        probs_te=nothing,
        logits_te=nothing,
        choice_te=nothing,
        valid_t=jnp.ones(len(expert_tk), bool),
        num_experts=E,
        expected_k=float(expert_tk.shape[1]),
    )
    return layer._dispatch(x, routing)


def setting(axes_mesh, name):
    sizes = MESHES[name][0]
    return jax.set_mesh(axes_mesh(**sizes)) if sizes else contextlib.nullcontext()


def inputs(rows, length, top_k):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    weights = {
        "w_gate": draw(E, D, F) / 4,
        "w_up": draw(E, D, F) / 4,
        "w_down": draw(E, F, D) / 5,
    }
    tokens = rows * length
    return weights, draw(rows, length, D), draw(tokens, top_k), draw(rows, length, D)


@pytest.mark.parametrize("cls", DISPATCHES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    ("mesh", "rows", "length", "top_k"), CASES, ids=lambda v: str(v)
)
def test_outputs_gradients_and_statistics(
    float64, axes_mesh, cls, mesh, rows, length, top_k
):
    """The output and all gradients are those of the sum over assignments."""
    template, shards = build(cls), MESHES[mesh][1]
    weights, x, weight_tk, grad = inputs(rows, length, top_k)
    tokens = rows * length

    @jax.jit
    def run(weights, x, weight_tk, expert_tk, valid_tk):
        forward = lambda *a: call(template, *a, expert_tk, valid_tk)
        y, pull, stats = jax.vjp(forward, weights, x, weight_tk, has_aux=True)
        return y, pull(grad), stats

    capacity = oracles.capacity(tokens // shards, top_k, E, FACTORS.get(cls, 8.0))
    dropped, rounds = {}, {}
    for name, (expert_tk, valid_tk) in patterns(tokens, top_k).items():
        with setting(axes_mesh, mesh):
            found = run(weights, x, weight_tk, expert_tk, valid_tk)
        y, grads, stats = jax.tree.map(np.asarray, found)
        place_tk, counts = oracles.positions(expert_tk, valid_tk, E, shards)
        keep_tk = valid_tk & (place_tk < capacity) if cls is Bucket else valid_tk
        want, want_grads = oracles.mixture(
            weights,
            x.reshape(-1, D),
            expert_tk,
            weight_tk,
            keep_tk,
            grad.reshape(-1, D),
        )
        close = functools.partial(
            np.testing.assert_allclose, rtol=1e-9, atol=1e-9, err_msg=name
        )
        close(y.reshape(-1, D), want)
        close(grads[1].reshape(-1, D), want_grads[1])
        close(grads[2], want_grads[2])
        for weight in weights:
            close(grads[0][weight], want_grads[0][weight])
        assert stats.assignments == valid_tk.sum()
        assert stats.dropped == (valid_tk & ~keep_tk).sum()
        if cls in FACTORS:
            later = min(capacity, (-(-capacity // 4) + 7) // 8 * 8)
            needed = 1 + max(0, -(-(counts.max() - capacity) // later))
            assert stats.rounds == (needed if cls is Exact else 1)
            assert stats.peak_fill == counts.max()
            assert stats.capacity == capacity
        dropped[name], rounds[name] = stats.dropped, stats.rounds
    if length == 32:  # The patterns do what they are here for.
        assert cls is not Bucket or dropped["balanced"] == 0 < dropped["all on one"]
        assert cls is not Exact or rounds["all on one"] >= 4
    if length == 32 and shards == 8 and cls is Exact:
        assert rounds["balanced"] == 1


def test_only_rows_cross_between_the_experts(axes_mesh):
    """Rows are exchanged; no shard ever holds another's experts."""
    mesh = axes_mesh(expert=4)
    weights, x, weight_tk, _ = jax.tree.map(np.float32, inputs(8, 8, 2))
    expert_tk, valid_tk = patterns(64, 2)["random"]

    def text(cls):
        template = build(cls, dtype="float32")
        place = lambda axes: rules.sharding(mesh, axes)
        into, out = ("expert", "expert_embed", "mlp"), ("expert", "mlp", "expert_embed")
        shardings = {"w_gate": place(into), "w_up": place(into), "w_down": place(out)}
        batch = place(("batch", "sequence", None))
        flat = place(("batch", None))
        with jax.set_mesh(mesh):
            compiled = jax.jit(
                lambda *a: call(template, *a)[0],
                in_shardings=(shardings, batch, flat, flat, flat),
                out_shardings=batch,
            ).lower(weights, x, weight_tk, expert_tk, valid_tk)
            return compiled.compile().as_text()

    def count(text, op):
        """Operations among several devices, not those over an axis of size one."""
        found = [x for x in text.splitlines() if re.search(rf"{op}(-start)?\(", x)]
        # jax 0.10 writes the devices, jax 0.11 the axes of the mesh.
        groups = r"replica_groups=(\{\{0,1,2,3\}\}|mesh\[[^]]*\] \{[^}]*'expert')"
        return sum(re.search(groups, line) is not None for line in found)

    exact = text(Exact)
    # There and back in the first round, and in the loop of the later ones.
    assert count(exact, "all-to-all") == 4
    assert count(exact, "all-gather") == 0
    assert count(text(DenseDispatch), "all-gather") > 0


@pytest.mark.parametrize(
    ("tokens", "expected_k", "num_experts", "factor", "rows"),
    [
        (64, 2.0, 8, 1.0, 16),
        (64, 2.0, 8, 1.25, 24),  # 20, up to a multiple of 8
        (64, 2.0, 8, 0.01, 8),
        (4, 2.0, 8, 1.0, 4),  # never more than there are tokens
        (64, 2.0, 8, 100.0, 64),
        (100, 1.5, 8, 1.0, 24),
    ],
)
def test_capacity_by_hand(tokens, expected_k, num_experts, factor, rows):
    found = plan.bucket_rows(tokens * expected_k / num_experts, factor, tokens)
    assert found == rows


@pytest.mark.parametrize("cls", [Bucket, Exact])
def test_problems(cls):
    problems = lambda factor: list(
        cls(capacity_factor=factor).problems("config.dispatch", config.Config())
    )
    assert problems(0.0) == problems(0.1) == []
    assert "capacity_factor=-1.0: must not be negative" in problems(-1.0)[0]


def test_experts_are_split_by_expert_width_and_hidden_width():
    assert build(Exact, dtype="float32").axes["experts"] == {
        "w_gate": ("expert", "expert_embed", "mlp"),
        "w_up": ("expert", "expert_embed", "mlp"),
        "w_down": ("expert", "mlp", "expert_embed"),
    }
