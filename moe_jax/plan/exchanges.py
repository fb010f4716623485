"""The collectives of a train step that grow with the model, by formulas.

Which there are, and how often, was read from compiled programs: dense weights are
gathered for each pass over a block, expert weights by the MoE layer itself, gradients
summed once a micro-batch. The time is that of `plan.collectives`: one line of links.
"""

import dataclasses
import math

from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.parallel import rules
from moe_jax.plan.chips import Chip
from moe_jax.plan.facts import Facts, Layout, Weight

# Share of the peak rate that matrix products reach.
MATMUL_RATE = 0.8
# Share of the time of weight gathers that no computation hides.
GATHERS_EXPOSED = 0.6
GATHERS = "weight gathers"
SUMS = "gradient sums"
TOKENS = "token exchange"
TENSOR = "tensor sums"
CONTEXT = "context gathers"
COLLECTIVES = (GATHERS, SUMS, TOKENS, TENSOR, CONTEXT)
_COPIES = ("data", "context")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective, all its executions in a step.

    Attributes:
      part: of `COLLECTIVES`.
      kind: "gather" (and its reverse), "reduce" or "exchange".
      axes: of the mesh.
      payload: bytes of one execution, whole.
      count: executions in a step.
      exposed: share of them that no computation hides.
      hidden: seconds of one that a product hides.
    """

    part: str
    kind: str
    axes: tuple[str, ...]
    payload: float
    count: float
    exposed: float = 1.0
    hidden: float = 0.0

    def cost(self, lay: Layout, chip: Chip) -> tuple[float, float]:
        """Bytes on the wire and seconds that they are waited for."""
        n = math.prod(lay.sizes[a] for a in self.axes)
        wire = self.payload * (n - 1) / n
        wire *= 2 if self.kind == "reduce" else 1
        hops = max(1.0, n / 4) if self.kind == "exchange" else 1.0
        spans = lay.slices > 1 and "data" in self.axes
        link = chip.dcn_bandwidth if spans else chip.link_bandwidth
        seconds = max(0.0, self.exposed * wire * hops / link - self.hidden)
        return self.count * wire, self.count * seconds


def _scatter(lay: Layout, axes: tuple[str, ...], size: float, count: float) -> Exchange:
    """A reduce-scatter; over the whole mesh it becomes a sum of all, and a slice."""
    whole = math.prod(lay.sizes[a] for a in axes) == lay.devices
    return Exchange(SUMS, "reduce" if whole else "gather", axes, size, count)


def _of_experts(lay: Layout, weight: Weight) -> list[Exchange]:
    """What the MoE layer does itself, on the weights of all layers at once."""
    micro = lay.micro_batches
    uses = micro * (1 + (lay.model.remat != "none"))
    size = weight.size / lay.ways("expert", "mlp") * lay.width
    found = [Exchange(GATHERS, "gather", ("fsdp",), size, uses, GATHERS_EXPOSED)]
    # The copies of a gradient are summed before it is split.
    sums = [
        _scatter(lay, ("fsdp",), size, micro),
        Exchange(SUMS, "reduce", _COPIES, size, micro),
    ]
    if isinstance(lay.dispatch, DenseDispatch):
        size *= lay.ways("expert")
        found.append(
            Exchange(GATHERS, "gather", ("expert",), size, uses, GATHERS_EXPOSED)
        )
        sums.append(_scatter(lay, ("expert",), size, micro))
    return found + (sums if weight.trained else [])


def _of_blocks(lay: Layout, weight: Weight, chip: Chip) -> list[Exchange]:
    """Of a dense weight inside of the blocks: all in the computation's type."""
    wide = rules.RULES["embed"]
    entries = weight.size / weight.layers
    entries /= lay.ways("tensor") if weight.part != "router" else 1
    size, times = entries * lay.width, weight.layers * lay.micro_batches
    # Forward, backward, and recomputation.
    uses, product, found = 2 + lay.recomputes, 0.0, []
    if lay.in_pieces:
        uses, product = uses - 1, _product_seconds(lay, entries, chip)
        found.append(Exchange(GATHERS, "gather", wide, size, times, hidden=product))
    found.append(Exchange(GATHERS, "gather", wide, size, uses * times, GATHERS_EXPOSED))
    if weight.trained:
        part = size / lay.ways("embed")
        found += [
            Exchange(SUMS, "gather", wide, size, times, hidden=product),
            Exchange(SUMS, "reduce", _COPIES, part, times),
        ]
    return found


def _of_outer(lay: Layout, weight: Weight, chip: Chip) -> list[Exchange]:
    """Of the embedding or the output matrix: gradients are summed in float32.

    The sum of a whole gradient leaves the loop over micro-batches.
    """
    wide, micro = rules.RULES["embed"], lay.micro_batches
    entries = weight.size / lay.ways("vocab")
    is_lookup = weight.part == "embedding"
    uses = micro * (1 + (is_lookup and lay.model.tie_embeddings))
    gather = Exchange(
        GATHERS, "gather", wide, entries * lay.width, uses, GATHERS_EXPOSED
    )
    if not weight.trained:
        return [gather]
    split = _scatter(lay, wide, 4 * entries, micro)
    if lay.in_pieces and not is_lookup:
        hidden = _product_seconds(lay, entries, chip)
        split = dataclasses.replace(split, kind="gather", hidden=hidden)
    elif split.kind == "reduce":
        split = dataclasses.replace(split, count=1)
    part = 4 * entries / lay.ways("embed")
    return [gather, split, Exchange(SUMS, "reduce", _COPIES, part, micro)]


def _product_seconds(lay: Layout, entries: float, chip: Chip) -> float:
    """Of a product of this device's tokens with a matrix."""
    return 2 * lay.tokens * entries / (MATMUL_RATE * chip.flops)


def exchanges(facts: Facts, lay: Layout, chip: Chip) -> list[Exchange]:
    """All collectives of a step that grow with the model."""
    model, micro = lay.model, lay.micro_batches
    found = []
    for weight in facts.weights:
        if weight.part == "experts":
            found += _of_experts(lay, weight)
        elif weight.part in ("embedding", "logits"):
            found += _of_outer(lay, weight, chip)
        else:
            found += _of_blocks(lay, weight, chip)
    rows = lay.tokens * model.d_model * lay.width
    sent = lay.sent * model.d_model * lay.width
    keys = 2 * lay.rows * lay.length * model.kv_heads * model.width_per_head * lay.width
    passes = micro * (2 + (model.remat != "none"))
    turns, layers = 2 * micro * (2 + lay.exchanges_again), model.num_layers
    keys /= lay.ways("heads")
    kind = "gather" if isinstance(lay.dispatch, Gather) else "exchange"
    return [
        *found,
        Exchange(TOKENS, kind, ("expert",), sent, turns * lay.moe_layers),
        Exchange(TENSOR, "reduce", ("tensor",), rows, 2 * passes * layers),
        Exchange(CONTEXT, "gather", ("context",), keys, passes * layers),
    ]
