"""What the compiled dispatches hold and move: memory, collectives, no scatter."""

import collections
import math
import re

import dispatching
import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from moe_jax.models import remat
from moe_jax.moe import sharded
from moe_jax.moe.dispatch import DISPATCHES
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.moe.dispatch.ragged import Ragged
from moe_jax.moe.dispatch.ring import Ring
from moe_jax.moe.routing import Assignments
from moe_jax.parallel import compiler, rules

EACH = [cls for cls in DISPATCHES if cls is not Auto]
name = lambda cls: cls.__name__


class Case:
    """A layer's dispatch and its derivative for abstract inputs."""

    def __init__(
        self, mesh, options, *, rows, tokens, d, experts, top_k, expected_k, d_ff=16
    ):
        made = dispatching.template(
            "gated", d_model=d, num_experts=experts, d_ff=d_ff, dtype="float32"
        )
        shapes = jax.eval_shape(made.init, jax.random.key(0))

        def like(shape, dtype, axes):
            where = rules.sharding(mesh, axes)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        weights = {
            n: like(a.shape, jnp.float32, made.axes[n]) for n, a in shapes.items()
        }
        x = like((rows, tokens // rows, d), jnp.float32, ("batch", "sequence", None))
        choice = lambda dtype: like((tokens, top_k), dtype, ("batch", None))
        floats = (weights, x, choice(jnp.float32))
        self.arguments = (floats, choice(jnp.int32), choice(jnp.bool_), x)

        def value(floats, expert_tk, valid_tk, grad, wrap=lambda f: f):
            def forward(weights, x, weight_tk):
                routing = Assignments(
                    expert_tk=expert_tk,
                    weight_tk=weight_tk,
                    valid_tk=valid_tk,
                    num_experts=experts,
                    expected_k=expected_k,
                )
                bound = made.bind(weights)
                return sharded.run(options, bound, ("expert",), x, routing)[0]

            y, pull = jax.vjp(wrap(forward), *floats)
            return y, pull(grad)

        self.value = value

    def compiled(self, **fields):
        run = jax.jit(lambda *given: self.value(*given, **fields))
        return run.lower(*self.arguments).compile()


def operations(jaxpr):
    """(name, shapes) of everything that a program computes, also in loops."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, [getattr(v.aval, "shape", ()) for v in eqn.outvars]
    for inner in core.subjaxprs(jaxpr):
        yield from operations(inner)


@pytest.mark.parametrize("cls", EACH, ids=name)
@pytest.mark.parametrize("top_k", [2, 64])
def test_nothing_scatters_and_nothing_is_as_large_as_k_rows_a_token(
    axes_mesh, cls, top_k
):
    """64 experts of which a token has two, in the K columns of token or expert choice.

    A derivative that scatters is slow on TPUs, and (T, K, D) is E / 2 times too much.
    """
    tokens, d = 256, 48
    mesh = axes_mesh(data=2, expert=4)
    fields = dict(rows=8, tokens=8 * tokens, d=d, experts=64, top_k=top_k)
    with jax.set_mesh(mesh):
        case = Case(mesh, cls(), expected_k=2.0, **fields)
        program = jax.make_jaxpr(case.value)(*case.arguments)
    found = list(operations(program.jaxpr))
    names = {primitive for primitive, _ in found}
    assert "shard_map" in names and names & {"dot_general", "ragged_dot_general"}
    assert not {n for n in names if n.startswith("scatter")}
    # Of one shard; what `shard_map` itself returns is that of all.
    rows = [
        math.prod(shape[:-1])
        for primitive, shapes in found
        for shape in shapes
        if shape[-1:] == (d,) and primitive != "shard_map"
    ]
    allowed = 8 if cls in (Gather, Ragged) else 4  # n T rows; n = 4
    if cls is not DenseDispatch:
        assert max(rows) <= allowed * tokens * 2


def temporary(axes_mesh, cls, shards):
    """Bytes of one layer, forward and backward, at 512 tokens a device."""
    mesh = axes_mesh(expert=shards)
    options = cls(capacity_factor=1.25)
    fields = dict(tokens=512 * shards, d=256, experts=64, top_k=8, expected_k=8.0)
    with jax.set_mesh(mesh):
        case = Case(mesh, options, rows=shards, d_ff=128, **fields)
        return case.compiled().memory_analysis().temp_size_in_bytes


def test_exact_needs_little_more_memory_than_dropping(axes_mesh):
    """At the same capacity; and no more on more shards, at equal tokens a device."""
    exact = {n: temporary(axes_mesh, Exact, n) for n in (2, 4, 8)}
    for shards, size in exact.items():
        assert size <= 1.35 * temporary(axes_mesh, Bucket, shards), shards
    assert max(exact[4], exact[8]) <= 1.1 * exact[2]


def test_a_ring_sends_one_shards_tokens_a_hop(axes_mesh):
    """Tokens and sums forward; the same and gradients in the reverse."""
    tokens, d, shards = 512, 48, 4
    mesh = axes_mesh(data=2, expert=shards)
    fields = dict(rows=8, tokens=8 * tokens, d=d, experts=8, top_k=2, expected_k=2.0)
    with jax.set_mesh(mesh):
        case = Case(mesh, Ring(), **fields)
        program = jax.make_jaxpr(case.value)(*case.arguments)
    found = list(operations(program.jaxpr))
    shapes_of = lambda name: [shapes for n, shapes in found if n == name]
    assert shapes_of("ppermute") == 5 * (shards - 1) * [[(tokens, d)]]
    # Choices and combine weights.
    assert {shape[-1] for (shape,) in shapes_of("all_gather")} == {2}


def collectives(text):
    """Collectives among several devices by kind, of a compiled program."""
    # jax 0.10 writes the devices, jax 0.11 the axes of the mesh.
    among = r"replica_groups=(\{\{0,1,2,3\}\}|mesh\[[^]]*\] \{[^}]*'expert')"
    kinds = r"(all-to-all|all-gather|reduce-scatter|all-reduce)(-start)?\("
    found = collections.Counter()
    for line in text.splitlines():
        kind = re.search(kinds, line)
        if kind and re.search(among, line) and "s32[]" not in line:
            found[kind[1]] += 1
    return found


SMALL = dict(rows=4, tokens=64, d=16, experts=8, top_k=2, expected_k=2.0)


def test_only_rows_cross_between_the_experts(axes_mesh):
    """Rows are exchanged; no shard ever holds another's experts."""
    mesh = axes_mesh(expert=4)

    def forward(cls):
        with jax.set_mesh(mesh):
            case = Case(mesh, cls(), **SMALL)
            run = jax.jit(lambda *given: case.value(*given)[0])
            return collectives(run.lower(*case.arguments).compile().as_text())

    # There and back in the first round, and in the loop of the later ones.
    assert forward(Exact) == {"all-to-all": 4}
    assert forward(Bucket) == {"all-to-all": 2}
    # Rows, weights, choices, validity; the sums on the way back.
    gather = forward(Gather)
    assert gather["all-to-all"] == 0 and gather["all-gather"] <= 4
    assert gather["all-reduce"] + gather["reduce-scatter"] == 1
    assert forward(DenseDispatch)["all-gather"] == 3


@pytest.mark.parametrize("cls", [Bucket, Exact, Gather, Ragged], ids=name)
def test_exchanges_are_not_repeated_in_rematerialisation(axes_mesh, cls):
    """Collectives of a step, in the compiled program, by remat policy."""
    mesh = axes_mesh(expert=4)

    def count(policy):
        # Two blocks in a scan: nothing of one pass is at hand in the other.
        def wrap(forward):
            def blocks(weights, x, weight_tk):
                block = lambda x, w: (x + forward(w, x, weight_tk), None)
                (chosen,) = remat.policies(policy)
                if chosen is not None:
                    block = jax.checkpoint(block, policy=chosen, prevent_cse=False)
                twice = jax.tree.map(lambda w: jnp.stack([w, w]), weights)
                return jax.lax.scan(block, x, twice)[0]

            return blocks

        with jax.set_mesh(mesh):
            case = Case(mesh, cls(), **SMALL)
            return collectives(case.compiled(wrap=wrap).as_text())

    plain, full, kept = map(count, ("none", "full", "exchanges"))
    assert kept == plain
    assert sum(full.values()) > sum(kept.values())
    if cls is Bucket:
        assert plain["all-to-all"] == 4 and full["all-to-all"] == 6
    if cls is Exact:
        # In the loop: two forward, four in its replay, whatever the policy.
        assert plain["all-to-all"] == 4 + 6 and full["all-to-all"] == 6 + 6


@pytest.mark.parametrize("cls", [Exact, Gather, Ragged, Ring], ids=name)
def test_a_weight_asked_for_early_is_gathered_once(axes_mesh, monkeypatch, cls):
    """On chips that send weights aside: XLA makes one of the two gathers."""
    mesh = axes_mesh(fsdp=2, expert=2)
    found = []
    for early in (False, True):
        monkeypatch.setattr(compiler, "sends_aside", lambda early=early: early)
        with jax.set_mesh(mesh):
            case = Case(mesh, cls(), **SMALL)
            program = jax.make_jaxpr(case.value)(*case.arguments)
            text = case.compiled().as_text()
        barriers = [n for n, _ in operations(program.jaxpr)].count(
            "optimization_barrier"
        )
        found.append((len(re.findall(r" all-gather(-start)?\(", text)), barriers))
    (gathers, before), (gathers_early, after) = found
    assert gathers_early == gathers > 0
    assert after > before
