"""What each expert does, as a table for the terminal."""

from collections.abc import Callable, Iterator

import numpy as np

_BLOCKS_AT_UNIFORM = 4
_MOST_BLOCKS = 12
_WIDTH = 100


def expert_table(
    counts_le: np.ndarray,
    tokens_le: np.ndarray | None = None,
    decode: Callable[[list[int]], str] | None = None,
    most: int = 16,
) -> str:
    """A table of the load and the typical tokens of every expert.

    Args:
      counts_le: tokens each expert served, (layers, experts).
      tokens_le: ids of the tokens that mark it, (layers, experts, top); negative
        ids are left out. None shows loads only.
      decode: ids to text.
      most: experts shown per layer; of more, the busiest.

    Returns:
      Lines without colour. A load is the expert's share of the layer's tokens over
      an equal share, so 1.00 is perfect balance.
    """
    counts_le = np.asarray(counts_le)
    lines = ["Experts: load (1.00 is an equal share)"]
    if tokens_le is not None:
        lines[0] += " and the tokens that mark them"
    for layer, counts_e in enumerate(counts_le):
        tokens_e = None if tokens_le is None else np.asarray(tokens_le)[layer]
        lines.extend(_layer_lines(layer, counts_e, tokens_e, decode, most))
    return "\n".join(lines)


def _layer_lines(
    layer: int,
    counts_e: np.ndarray,
    tokens_e: np.ndarray | None,
    decode: Callable[[list[int]], str] | None,
    most: int,
) -> Iterator[str]:
    total, num_experts = counts_e.sum(), len(counts_e)
    if total == 0:
        yield f"layer {layer}: no tokens"
        return
    load_e = counts_e * (num_experts / total)
    dead = np.flatnonzero(counts_e == 0)
    yield f"layer {layer}: max/mean {load_e.max():.2f}, {_dead(dead, num_experts)}"
    shown = range(num_experts)
    if num_experts > most:
        shown = sorted(np.argsort(-load_e, kind="stable")[:most].tolist())
    for expert in shown:
        line = f"  {expert:>4}  {load_e[expert]:5.2f} {_bar(load_e[expert])}"
        if tokens_e is not None and decode is not None:
            line += "  " + _words(tokens_e[expert], decode)
        yield line[:_WIDTH].rstrip()
    if num_experts > most:
        yield f"        ... and {num_experts - most} that served less"


def _dead(dead: np.ndarray, num_experts: int) -> str:
    if not len(dead):
        return "none dead"
    names = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
    return f"{len(dead)} of {num_experts} dead ({names})"


def _bar(load: float) -> str:
    blocks = round(float(load) * _BLOCKS_AT_UNIFORM)
    if blocks > _MOST_BLOCKS:
        return "#" * (_MOST_BLOCKS - 1) + "+"
    return ("#" * blocks).ljust(_MOST_BLOCKS)


def _words(ids: np.ndarray, decode: Callable[[list[int]], str]) -> str:
    # repr: a token may be a line feed, an escape sequence or only blanks.
    return " ".join(repr(decode([int(i)])) for i in ids if i >= 0)
