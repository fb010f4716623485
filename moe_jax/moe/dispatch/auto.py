"""The dispatch that a written rule expects to be cheapest; exact in any case.

Compared are the elements that one shard sends in one pass, per token and in units of
D, over the n shards of the expert group, with n' the shards that a token visits
(`ragged.destinations`) and C / m what buckets have room for over their mean:

| dispatch | elements |
|---|---|
| gather | n - 1 (and n - 1 for the results) |
| exact | K (n - 1) / n * C / m |
| ragged | n' (n - 1) / n * 1.25 |

`Gather` is taken where it sends no more than the other. That bounds its buffers too:
they grow with n, and n is then below K times the padding. The other is `Ragged` on
TPUs, where grouped matmuls and `ragged_all_to_all` are at hand (1.25 stands for the
copies around that exchange), and `Exact` elsewhere. With one shard nothing is exchanged
and `Ragged` is taken everywhere: its list of rows needs one round under any routing.
"""

import math

import jax

from moe_jax import config
from moe_jax.moe.dispatch import exact, gather, ragged
from moe_jax.moe.dispatch.common import Axes, LocalExperts
from moe_jax.moe.dispatch.plan import bucket_rows
from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree
from moe_jax.parallel import rules
from moe_jax.parallel.mesh import platform

_RAGGED_COPIES = 1.25
_DISPATCHES = {
    exact.Exact: exact.dispatch,
    gather.Gather: gather.dispatch,
    ragged.Ragged: ragged.dispatch,
}


@config.node
class Auto(config.DispatchConfig):
    """`Exact`, `Ragged` or `Gather`, each with its defaults.

    Training says which one it is once the step is compiled.
    """


def choose(
    where: str, shards: int, num_tokens: int, expected_k: float, num_experts: int
) -> config.DispatchConfig:
    """Applies the rule.

    Args:
      where: "cpu", "gpu" or "tpu".
      shards: n, over which the experts are split.
      num_tokens: T of one shard.
      expected_k: K.
      num_experts: E.
    """
    mean = num_tokens * expected_k / num_experts
    padding = bucket_rows(mean, 0.0, num_tokens) / max(mean, 1e-9)
    if where == "tpu" or shards == 1:
        other = ragged.Ragged()
        visits = ragged.destinations(expected_k, num_experts, shards)
        sent = visits * _RAGGED_COPIES
    else:
        other, sent = exact.Exact(), expected_k * padding
    return gather.Gather() if 1 < shards <= sent else other


def describe(
    expert_axes: tuple[str, ...], num_tokens: int, expected_k: float, num_experts: int
) -> str:
    """A line about the choice under the current mesh (`jax.set_mesh`).

    Args:
      expert_axes: mesh axes over which the experts are split.
      num_tokens: of all shards together.
      expected_k: K.
      num_experts: E.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sequence = rules.grouped("sequence", expert_axes)
    shards = math.prod(mesh.shape.get(axis, 1) for axis in expert_axes)
    num_tokens //= rules.size(mesh, "batch") * rules.size(mesh, sequence)
    chosen = choose(platform(), shards, num_tokens, expected_k, num_experts)
    return (
        f"auto dispatch: {type(chosen).__name__} for {num_tokens} tokens a shard, "
        f"K={expected_k:g} of {num_experts} experts over {shards} shards on "
        f"{platform()}"
    )


def dispatch(
    options: Auto,
    rows: PyTree,
    routing: Assignments,
    experts: LocalExperts,
    axes: Axes,
) -> tuple[Array, DispatchStats]:
    """Resolves to another dispatch at trace time; see `DISPATCHES`."""
    shards, num_tokens = axes.expert_shards(), routing.expert_tk.shape[0]
    chosen = choose(
        platform(), shards, num_tokens, routing.expected_k, routing.num_experts
    )
    return _DISPATCHES[type(chosen)](chosen, rows, routing, experts, axes)
