"""The collectives of a train step that grow with the model, by formulas.

Which there are, and how often, was read from compiled programs: weights are gathered
for each pass over a block, gradients summed once a micro-batch. The time is that of
`plan.collectives`: one line of links.
"""

import dataclasses
import math

from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.moe.dispatch.ring import Ring
from moe_jax.nn import embedding
from moe_jax.parallel import rules
from moe_jax.plan.chips import Chip
from moe_jax.plan.facts import Facts, Layout, Weight

# Share of the peak rate that matrix products reach.
MATMUL_RATE = 0.8
# Share of the time of weight gathers that no computation hides.
GATHERS_EXPOSED = 0.6
# Share of the time of a ring's transfers, the same.
RING_EXPOSED = 0.5
GATHERS = "weight gathers"
SUMS = "gradient sums"
TOKENS = "token exchange"
ROWS = "embedding exchange"
TENSOR = "tensor sums"
CONTEXT = "context gathers"
COLLECTIVES = (GATHERS, SUMS, TOKENS, ROWS, TENSOR, CONTEXT)
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
    """

    part: str
    kind: str
    axes: tuple[str, ...]
    payload: float
    count: float
    exposed: float = 1.0

    def cost(self, lay: Layout, chip: Chip) -> tuple[float, float]:
        """Bytes on the wire and seconds that they are waited for."""
        n = math.prod(lay.sizes[a] for a in self.axes)
        wire = self.payload * (n - 1) / n
        wire *= 2 if self.kind == "reduce" else 1
        hops = max(1.0, n / 4) if self.kind == "exchange" else 1.0
        spans = lay.slices > 1 and "data" in self.axes
        link = chip.dcn_bandwidth if spans else chip.link_bandwidth
        seconds = self.exposed * wire * hops / link
        return self.count * wire, self.count * seconds


def _split(
    lay: Layout, weight: Weight, axes: tuple[str, ...], size: float, uses: int
) -> list[Exchange]:
    """A weight's gathers over the axes that split it, and the sums of its gradient.

    All are in the type of the computation; a gradient is split before its copies are
    summed.

    Args:
      lay: the layout.
      weight: of one part.
      axes: of the mesh.
      size: bytes of all its layers, whole.
      uses: gathers per micro-batch.
    """
    micro, ways = lay.micro_batches, math.prod(lay.sizes[axis] for axis in axes)
    count = 1 if lay.gathers_once else uses * micro
    found = [Exchange(GATHERS, "gather", axes, size, count, GATHERS_EXPOSED)]
    if weight.trained:
        found.append(Exchange(SUMS, "gather", axes, size, micro))
        found.append(Exchange(SUMS, "reduce", _COPIES, size / ways, micro))
    return found


def _of_weight(lay: Layout, weight: Weight) -> list[Exchange]:
    """Of all layers: gathered for each pass over a block, again where it recomputes."""
    uses = 1 + (lay.model.remat != "none" and not lay.keeps("weights"))
    if weight.part == "experts":
        size = weight.size / lay.ways("expert", "mlp") * lay.width
        found = _split(lay, weight, ("fsdp",), size, uses)
        if isinstance(lay.dispatch, DenseDispatch):
            size *= lay.ways("expert")
            found += _split(lay, weight, ("expert",), size, uses)[:2]
        return found
    size = weight.size * lay.width
    size /= lay.ways("tensor") if weight.part != "router" else 1
    if weight.block:
        return _split(lay, weight, rules.RULES["embed"], size, uses)
    axes = rules.RULES["embed"]
    product = _split(lay, weight, axes, size, 1)
    if weight.part != "embedding":
        return product
    vocab = lay.model.vocab_size / lay.ways("vocab")
    lookup = list(product)
    if embedding.exchanges(lay.tokens, vocab):
        rows = lay.tokens * lay.model.d_model * lay.width
        times = (1 + weight.trained) * lay.micro_batches
        copies = [e for e in product if e.kind == "reduce"]
        turns = [Exchange(ROWS, "exchange", (axis,), rows, times) for axis in axes]
        lookup = [*turns, *copies]
    return lookup + (product if lay.model.tie_embeddings else [])


def exchanges(facts: Facts, lay: Layout) -> list[Exchange]:
    """All collectives of a step that grow with the model."""
    model, micro = lay.model, lay.micro_batches
    found = []
    for weight in facts.weights:
        found += _of_weight(lay, weight)
    rows = lay.tokens * model.d_model * lay.width
    sent = lay.sent * model.d_model * lay.width
    widths = model.width_per_head + model.value_width
    keys = lay.rows * lay.length * model.kv_heads * widths * lay.width
    passes = micro * (2 + (model.remat != "none"))
    turns, layers = 2 * micro * (2 + lay.exchanges_again), model.num_layers
    keys /= lay.ways("heads")
    count, exposed = turns * lay.moe_layers, 1.0
    if isinstance(lay.dispatch, Ring):  # Two passes forward, three in the reverse.
        count, exposed = 5 * micro * lay.moe_layers, RING_EXPOSED
    kind = "gather" if isinstance(lay.dispatch, Gather | Ring) else "exchange"
    return [
        *found,
        Exchange(TOKENS, kind, ("expert",), sent, count, exposed),
        Exchange(TENSOR, "reduce", ("tensor",), rows, 2 * passes * layers),
        Exchange(CONTEXT, "gather", ("context",), keys, passes * layers),
    ]
