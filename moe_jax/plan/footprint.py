"""What a train step keeps in memory at its peak, by formulas.

Parameters and optimizer state are exact. The rest is counted at two moments of the
backward pass: at the loss, where the logits are, and inside of a block.
"""

from collections.abc import Iterable

from moe_jax.nn.attention.scores import Scores
from moe_jax.plan.facts import Facts, Layout, Weight

Memory = dict[str, float]
_CLASSES = ("activations", "dispatch", "gathered weights")


def _sum(parts: Iterable[Memory]) -> Memory:
    parts = list(parts)
    return {name: sum(part[name] for part in parts) for name in _CLASSES}


def _times(part: Memory, count: float) -> Memory:
    return {name: size * count for name, size in part.items()}


def _side(lay: Layout, weight: Weight, experts: int = 1) -> float:
    """The side of a matrix that is not the model's width, on one device."""
    one = weight.size / (weight.layers * experts * lay.model.d_model)
    return one / lay.ways("tensor")


def _scores(lay: Layout) -> float:
    """Scores of a layer that are kept at once: all, or none but their sums."""
    if not isinstance(lay.attention, Scores):
        return 0.0
    return lay.tokens * lay.length * lay.model.num_heads / lay.ways("heads")


def _block(lay: Layout, weights: list[Weight]) -> Memory:
    """What one block with these weights keeps for its backward pass, all of it."""
    model, width = lay.model, lay.width
    # Queries and keys; values and what they are mixed to.
    widths = model.width_per_head + model.value_width
    heads = (model.num_heads + model.kv_heads) * widths
    heads /= lay.ways("heads")
    # Sums of the softmax; all of it in float32 and in the computation's type.
    activations = lay.tokens * width * (heads + 4 * model.d_model)
    activations += 4 * lay.tokens * model.num_heads / lay.ways("heads")
    activations += _scores(lay) * (4 + width)
    dispatch = gathered = 0.0
    for weight in weights:
        if weight.part in ("attention", "feed-forward"):
            gathered += weight.size / weight.layers / lay.ways("tensor") * width
        if weight.part == "feed-forward":
            activations += lay.tokens * _side(lay, weight) * width
        if weight.part == "experts":
            experts = lay.moe.num_experts
            dispatch += lay.served * _side(lay, weight, experts) * width
            local = lay.ways("expert", "mlp")
            gathered += weight.size / weight.layers / local * width
    if dispatch:
        # Sent, served, and brought back.
        dispatch += 3 * lay.sent * model.d_model * width
    return dict(zip(_CLASSES, (activations, dispatch, gathered), strict=True))


def _kept_by_dots(facts: Facts, lay: Layout) -> float:
    """Outputs of matrix products without batch dimensions, of all layers."""
    total = 0.0
    for weight in facts.weights:
        if weight.part in ("attention", "feed-forward", "router"):
            out = weight.axes[-1] == "embed"
            width = lay.model.d_model if out else _side(lay, weight)
            total += weight.layers * lay.tokens * width * lay.width
    return total


def _segments(facts: Facts, lay: Layout) -> list[tuple[int, Memory]]:
    """Repeats of each segment, and what one repeat keeps."""
    blocks: dict[str, list[Weight]] = {}
    for weight in facts.weights:
        if weight.block:
            blocks.setdefault(weight.block, []).append(weight)
    segments: dict[str, list[str]] = {}
    for name in blocks:
        segments.setdefault(name.split("/")[0], []).append(name)
    return [
        (blocks[names[0]][0].layers, _sum(_block(lay, blocks[name]) for name in names))
        for names in segments.values()
    ]


def _logits(lay: Layout) -> float:
    """A chunk's logits in float32, their gradient; the matrix and its gradient."""
    vocab = lay.model.vocab_size / lay.ways("vocab")
    return (4 + lay.width) * vocab * (lay.chunk + lay.model.d_model)


def kept(facts: Facts, lay: Layout) -> Memory:
    """Bytes by class that the forward pass keeps for the backward pass."""
    segments = _segments(facts, lay)
    if lay.model.remat == "none":
        found = _sum(_times(part, repeats) for repeats, part in segments)
    else:
        found = dict.fromkeys(_CLASSES, 0.0)
    stream = lay.tokens * lay.model.d_model * lay.width
    found["activations"] += stream * sum(repeats for repeats, _ in segments)
    if lay.model.remat == "dots":
        found["activations"] += _kept_by_dots(facts, lay)
    if lay.keeps("exchanges"):
        # What came to the experts, and what came back.
        sent = lay.sent * lay.model.d_model * lay.width
        found["dispatch"] += 2 * sent * lay.moe_layers
    return _sum((found, _kept_by_name(facts, lay)))


def _kept_by_name(facts: Facts, lay: Layout) -> Memory:
    """What `remat` names, but for exchanges; of all layers."""
    model, found = lay.model, dict.fromkeys(_CLASSES, 0.0)
    heads = model.num_layers * lay.tokens / lay.ways("heads")
    if lay.keeps("attention"):
        size = lay.width * model.value_width + 4
        found["activations"] += heads * model.num_heads * size
    if lay.keeps("projections"):
        rows = model.kv_heads * (model.width_per_head + model.value_width)
        rows += model.num_heads * model.width_per_head
        found["activations"] += heads * rows * lay.width
    for weight in facts.weights:
        is_expert = weight.part == "experts"
        experts = lay.moe.num_experts if is_expert else 1
        into = weight.axes[-1] not in ("embed", "expert_embed")
        if lay.keeps("hidden") and into and weight.part in ("experts", "feed-forward"):
            rows = weight.layers * (lay.served if is_expert else lay.tokens)
            kind = "dispatch" if is_expert else "activations"
            found[kind] += rows * _side(lay, weight, experts) * lay.width
        if lay.keeps("weights") and weight.block and weight.part != "router":
            whole = lay.ways("expert", "mlp") if is_expert else lay.ways("tensor")
            found["gathered weights"] += weight.size / whole * lay.width
    return found


def at_peak(facts: Facts, lay: Layout) -> Memory:
    """Bytes by class at the peak: at the loss, or inside of a block's backward pass."""
    state = {"parameters": 0.0, "optimizer": 0.0}
    gradients = added_up = 0.0
    for leaf in facts.leaves:
        size = leaf.local_bytes(lay.sizes)
        state[leaf.kind] += size
        gradients += leaf.gradient_bytes(lay.sizes)
        if lay.micro_batches > 1 and leaf.gradient_itemsize:
            added_up += size
    # In the block's backward pass: the gradient of the scores, of gathered weights.
    parts = (part for _, part in _segments(facts, lay))
    block = dict(max(parts, key=lambda part: sum(part.values())))
    block["gathered weights"] *= 2
    block["activations"] += lay.width * _scores(lay)
    saved, logits = kept(facts, lay), _logits(lay)
    if logits > sum(block.values()) + gradients:
        return {**state, "gradients": added_up, **saved, "logits": logits}
    inside = _sum((saved, block))
    return {**state, "gradients": added_up + gradients, **inside, "logits": 0.0}
