"""How a model's blocks form segments, each one scan over stacked weights."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.models import remat as remat_lib
from moe_jax.moe import capabilities
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import MoEAux, Override

MOST_BLOCKS = 10_000


class Kind(NamedTuple):
    """What a block is.

    Attributes:
      moe: whether its feed-forward is made of experts.
      window: positions that a query sees; 0: all before it, or all.
    """

    moe: bool
    window: int = 0


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of blocks that repeats: one scan.

    Attributes:
      blocks: of the pattern.
      repeats: times the pattern occurs.
      first_layer: index of its first block in the model.
      first_moe: number of MoE blocks below.
    """

    blocks: tuple[Kind, ...]
    repeats: int
    first_layer: int
    first_moe: int

    @property
    def num_moe(self) -> int:
        """MoE blocks of the pattern."""
        return sum(kind.moe for kind in self.blocks)

    def named_blocks(self) -> list[tuple[str, Kind]]:
        """The pattern's blocks by their names in the parameters."""
        return [(f"block_{i}", kind) for i, kind in enumerate(self.blocks)]

    def part_of(self, override: Override | None):
        """The part of an override stacked on MoE layers that the scan takes."""
        if override is None or not self.num_moe:
            return None
        names = [name for name, kind in self.named_blocks() if kind.moe]
        last = self.first_moe + self.repeats * self.num_moe

        def part(first):
            return jax.tree.map(lambda a: a[first : last : self.num_moe], override)

        return {name: part(self.first_moe + i) for i, name in enumerate(names)}


def cut(
    feed_forward: config.FeedForwardConfig, windows: Sequence[int], every: int = 1
) -> tuple[Segment, ...]:
    """Cuts blocks into runs of one repeating pattern each.

    Args:
      feed_forward: dense, or an `MoE` that says which blocks it stands in.
      windows: that of each block.
      every: period of the windows.
    """
    total = len(windows)
    runs = [((False,), total)]
    if isinstance(feed_forward, MoE):
        ff = feed_forward
        repeats, rest = divmod(total - ff.first_dense, ff.every)
        pattern = (False,) * (ff.every - 1) + (True,)
        runs = [((False,), ff.first_dense), (pattern, repeats), ((False,), rest)]
    found, layer, moe_layer = [], 0, 0
    for moe, count in runs:
        length = len(moe) * count
        blocks = tuple(map(Kind, moe * count, windows[layer : layer + length]))
        period = math.lcm(len(moe), every)
        whole = length // period * period
        for part in (blocks[:whole], blocks[whole:]):
            if part:
                seg = part[:period]
                found.append(Segment(seg, len(part) // len(seg), layer, moe_layer))
                layer += len(part)
                moe_layer += sum(kind.moe for kind in part)
    return tuple(found)


def shrink(ff: config.FeedForwardConfig) -> int:
    """Narrows the blocks' feed-forward, in place; of a small model of the same kind.

    Returns:
      The number of blocks that show its pattern twice.
    """
    if not isinstance(ff, MoE):
        ff.d_ff = 64
        return 2
    ff.first_dense = min(ff.first_dense, 1)
    ff.experts.d_ff = 64
    ff.shared_d_ff = 64 if ff.shared_d_ff else 0
    ff.dense_d_ff = 64 if ff.first_dense or ff.every > 1 else 0
    return ff.first_dense + 2 * ff.every


def size_problems(
    options: config.ModelConfig, path: str, **least: int
) -> Iterator[str]:
    """Rules of single sizes, without which the others cannot be looked at."""
    for name, size in least.items():
        if getattr(options, name) < size:
            yield f"{path}.{name}={getattr(options, name)}: must be at least {size}"
    if options.num_layers > MOST_BLOCKS:
        yield (
            f"{path}.num_layers={options.num_layers}: must be at most {MOST_BLOCKS:,}"
        )


def moe_problems(
    options: config.ModelConfig, path: str, root: config.Config
) -> Iterator[str]:
    """Rules of a model's `feed_forward`, `num_layers` and `remat` together."""
    ff = options.feed_forward
    if not isinstance(ff, MoE):
        if remat_lib.names_of(options.remat) & {"exchanges", "host:exchanges"}:
            yield (
                f"{path}.remat={options.remat!r}: there are no experts, so nothing is "
                "exchanged; leave 'exchanges' out, or set 'full'"
            )
        return
    null = getattr(options, "condition_dropout", 0) > 0
    where = f"{path}.feed_forward"
    yield from capabilities.unconditional_problems(ff, where, null)
    if options.num_layers < max(0, ff.first_dense) + max(1, ff.every):
        yield (
            f"{path}.feed_forward.first_dense={ff.first_dense} and "
            f"every={ff.every} leaves no block for experts: "
            f"{path}.num_layers={options.num_layers}"
        )


def turn_problems(
    options: config.ModelConfig,
    segments_of: Callable[[Any], tuple[Segment, ...]],
    path: str,
) -> Iterator[str]:
    """Of policies that are taken in turn by a run of blocks."""
    remat, ff = options.remat, options.feed_forward
    if isinstance(ff, MoE):
        if not 0 <= ff.first_dense <= options.num_layers - ff.every or ff.every < 1:
            return  # Told elsewhere.
    count = remat.count(",") + 1
    for seg in segments_of(options) if count > 1 else ():
        if seg.repeats > count and seg.repeats % count:
            of = f"times {len(seg.blocks)} blocks" if seg.blocks[1:] else "blocks"
            yield (
                f"{path}.remat={remat!r} has {count} policies, taken in turn: "
                f"the run of {seg.repeats} {of} from block {seg.first_layer} on is "
                f"not a multiple; their number takes one of "
                f"{config.divisors(seg.repeats)}"
            )


def interleave(auxes: list[MoEAux]) -> MoEAux:
    """Aux of a pattern's MoE blocks, each (R, ...), in layer order (R * n, ...)."""

    def join(*leaves):
        joined = jnp.stack(leaves, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(join, *auxes)
