"""What a train step would cost on a mesh, by formulas: no compilation, milliseconds.

Each part of the step (attention, experts, ...) takes the longer of its FLOPs at the
rate that matrix products reach and its HBM bytes at the bandwidth; collectives follow
one after another and overlap nothing, as most of them do in today's programs. The
bytes of parameters and optimizer state are exact, all else is counted from shapes.

The figures rank layouts of one config; `moe_jax.plan.program` compiles the best.
"""

import dataclasses
import math

from moe_jax.config import Config
from moe_jax.nn.attention.scores import Scores
from moe_jax.plan import exchanges, footprint
from moe_jax.plan import facts as facts_lib
from moe_jax.plan.chips import Chip
from moe_jax.plan.exchanges import COLLECTIVES, MATMUL_RATE
from moe_jax.plan.facts import Facts, Layout, Weight

# HBM bytes per attention score in a forward pass: written and read in float32. They
# are also scaled, masked and exponentiated: what it takes, as bytes; on the chip less.
SCORE_BYTES = 12
SCORE_WORK = 16
SCORE_WORK_ON_CHIP = 5
# Attention without an array of all scores: queries, and keys, taken at a time; and its
# backward pass over its forward pass: 7 products for 2, two of them computed twice.
ATTENTION_BLOCK = 512
ATTENTION_BACKWARD = 3.5
# What a block works on stays on the chip up to so many bytes.
ON_CHIP_BYTES = 96 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One device's step.

    Attributes:
      memory: bytes at the peak by class.
      seconds: by part; those in `COLLECTIVES` are waits, the rest is work.
      wire: bytes sent by collective part.
      model_flops: of the mathematics.
      executed_flops: with recomputation, padding, and scores that are masked out.
      hbm_bytes: read and written.
    """

    memory: dict[str, float]
    seconds: dict[str, float]
    wire: dict[str, float]
    model_flops: float
    executed_flops: float
    hbm_bytes: float

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def wire_bytes(self) -> float:
        return sum(self.wire.values())

    @property
    def exposed_seconds(self) -> float:
        return sum(self.seconds.get(part, 0.0) for part in COLLECTIVES)


@dataclasses.dataclass(frozen=True)
class Work:
    """One forward pass of a part on one device.

    Attributes:
      part: name.
      flops: floating point operations.
      hbm: bytes.
      redone: executed again in the backward pass.
      extra: time that it takes at least, as bytes of HBM traffic.
      backward: cost of the backward pass over that of the forward pass.
    """

    part: str
    flops: float
    hbm: float
    redone: bool
    extra: float = 0.0
    backward: float = 2.0

    def seconds(self, chip: Chip) -> float:
        return max(
            self.flops / (MATMUL_RATE * chip.flops),
            max(self.hbm, self.extra) / chip.hbm_bandwidth,
        )


def _weight_work(lay: Layout, weight: Weight) -> Work:
    """A matrix times its rows; one side of it is the model's width."""
    is_expert = weight.part == "experts"
    experts = lay.moe.num_experts if is_expert else 1
    rows = weight.layers * (lay.served if is_expert else lay.tokens)
    tensor = lay.ways("tensor") if weight.part != "router" else 1
    side = weight.size / (weight.layers * experts * lay.model.d_model) / tensor
    gathered = weight.size / tensor / (lay.ways("expert") if is_expert else 1)
    hbm = lay.width * (rows * (lay.model.d_model + side) + 2 * gathered)
    flops = 2 * rows * lay.model.d_model * side
    if not weight.block:
        # float32 logits are written and read for the loss and for their gradient;
        # each chunk reads the matrix twice, and adds to its float32 gradient.
        chunks = lay.tokens / lay.chunk
        moved = (12 + 3 * lay.width) * lay.tokens
        moved += (8 + 2 * lay.width) * chunks * lay.model.d_model
        return Work("logits", flops, moved * side / 3, False)
    remat = lay.model.remat
    redone = lay.recomputes or (remat == "dots" and is_expert)
    name = "projections" if weight.part == "attention" else "hidden"
    if lay.keeps(name) and weight.axes[-1] not in ("embed", "expert_embed"):
        redone = False
    return Work(weight.part, flops, hbm, redone)


def _attention(lay: Layout) -> Work:
    """Scores, softmax and mixing, whose passes may not fit on the chip."""
    model = lay.model
    if not isinstance(lay.attention, Scores):
        return _blocked_attention(lay)
    scores = lay.tokens * lay.length * model.num_heads / lay.ways("heads")
    widths = model.width_per_head + model.value_width
    on_chip = 4 * scores <= ON_CHIP_BYTES
    scores *= model.num_layers
    return Work(
        "attention",
        flops=2 * scores * widths,
        hbm=0.0 if on_chip else SCORE_BYTES * scores,
        redone=model.remat != "none" and not lay.keeps("attention"),
        extra=(SCORE_WORK_ON_CHIP if on_chip else SCORE_WORK) * scores,
    )


def _blocked_attention(lay: Layout) -> Work:
    """Blocks below the diagonal, in the window; with `context`, of the last shard."""
    model, block = lay.model, min(ATTENTION_BLOCK, lay.length)
    heads = model.num_heads / lay.ways("heads")
    causal = lay.length - lay.length / lay.ways("context") / 2 + block / 2
    windows = (window or lay.length for window in model.windows())
    seen = sum(min(causal, window + block) for window in windows)
    scores = heads * lay.tokens * seen
    widths = model.width_per_head + model.value_width
    # Queries and results once, keys and values for each block of queries.
    moved = heads * model.num_layers * lay.tokens + scores / block
    return Work(
        "attention",
        flops=2 * scores * widths,
        hbm=lay.width * moved * widths,
        redone=lay.model.remat != "none" and not lay.keeps("attention"),
        backward=ATTENTION_BACKWARD,
    )


def _forward(facts: Facts, lay: Layout) -> list[Work]:
    model, redone = lay.model, lay.model.remat != "none"
    is_lookup = lambda w: w.part == "embedding" and not model.tie_embeddings
    products = [_weight_work(lay, w) for w in facts.weights if not is_lookup(w)]
    stream = lay.tokens * model.d_model * lay.width
    passes = 1 if 4 * stream <= ON_CHIP_BYTES else 2
    # Where nothing is sent, every expert has a copy of every row.
    rows = (lay.sent or lay.served) * model.d_model * lay.width
    moves = 2 * passes * (2 if lay.sent and lay.ways("expert") > 1 else 1)
    return [
        *products,
        _attention(lay),
        Work("norms", 0.0, 6 * passes * model.num_layers * stream, redone),
        Work("dispatch", 0.0, moves * lay.moe_layers * rows, redone),
    ]


def _work(facts: Facts, lay: Layout, chip: Chip) -> tuple[dict, float, float]:
    """Seconds by part, executed FLOPs and HBM bytes of a step."""
    seconds: dict[str, float] = {}
    flops = hbm = 0.0
    for work in _forward(facts, lay):
        once = lay.micro_batches * work.seconds(chip)
        times = 1 + work.backward
        seconds[work.part] = seconds.get(work.part, 0.0) + times * once
        times += work.redone
        if work.redone:
            seconds["recomputation"] = seconds.get("recomputation", 0.0) + once
        flops += lay.micro_batches * times * work.flops
        hbm += lay.micro_batches * times * work.hbm
    # Written by the forward pass and read by the backward pass.
    saved = 2 * lay.micro_batches * sum(footprint.kept(facts, lay).values())
    seconds["kept activations"] = saved / chip.hbm_bandwidth
    # Read and written; gradients are read for their norm and for the update, and
    # with micro-batches added up.
    sizes = [(leaf, leaf.local_bytes(lay.sizes)) for leaf in facts.leaves]
    gradients = sum(leaf.gradient_bytes(lay.sizes) for leaf, _ in sizes)
    update = 2 * sum(size for _, size in sizes) + 2 * gradients
    if lay.micro_batches > 1:
        sums = sum(size for leaf, size in sizes if leaf.gradient_itemsize)
        update += lay.micro_batches * (gradients + 2 * sums)
    seconds["optimizer"] = update / chip.hbm_bandwidth
    return seconds, flops, hbm + saved + update


def estimate(
    config: Config, chip: Chip, sizes: dict[str, int], slices: int = 1
) -> Estimate:
    """The cost of a legal config's step on one device.

    Args:
      config: the experiment; its own mesh is not looked at.
      chip: the device.
      sizes: of all mesh axes.
      slices: that the data axis spans.

    Raises:
      UserError: the model is of a family whose cost is not known here.
    """
    facts = facts_lib.of_config(config)
    lay = facts_lib.layout_of(config, sizes, slices)
    memory = footprint.at_peak(facts, lay)
    seconds, flops, hbm = _work(facts, lay, chip)
    wire: dict[str, float] = {}
    for exchange in exchanges.exchanges(facts, lay):
        sent, secs = exchange.cost(lay, chip)
        wire[exchange.part] = wire.get(exchange.part, 0.0) + sent
        seconds[exchange.part] = seconds.get(exchange.part, 0.0) + secs
    whole = config.train.batch_size * config.data.sequence_length
    return Estimate(
        memory=memory,
        seconds=seconds,
        wire=wire,
        model_flops=whole * facts.flops_per_token / math.prod(sizes.values()),
        executed_flops=flops,
        hbm_bytes=hbm,
    )
