"""Work of hand-written (Mosaic) kernels, from their grid and the rows they really do.

Their authors' own cost estimates are not comparable: a grouped matmul's counts every
row of its buffer. Here a grouped matmul of (m, k) by (G, k, n) does `fill` of its
rows, in tiles of (tm, tk, tn); a tile on the border of two groups is done twice.
Causal attention does the tiles that hold a score below the diagonal, of a window's at
most as many as its grid is wide, or half of all scores where the kernel does not say
its tiles.

From libtpu 0.0.52 on, XLA writes `ragged_dot` as a product of every row with every
group whose iterations are skipped where a tile holds no row of the group.
"""

import dataclasses
import re

from moe_jax.plan.hlo import HBM, Computation, Instruction

_DEFAULT_TILE = (128, 1 << 30, 1 << 30)


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """What one call does: kind, FLOPs, HBM bytes; `known` is false for a guess."""

    kind: str
    flops: float
    hbm_bytes: float
    known: bool = True


def is_kernel(instruction: Instruction) -> bool:
    return (
        instruction.opcode == "custom-call"
        and "tpu_custom_call" in instruction.attributes
    )


def kernel_work(
    comp: Computation, call: Instruction, moved: float, fill: float
) -> KernelWork:
    """The work of a call.

    Args:
      comp: where the call stands.
      call: the custom call.
      moved: bytes of its operands and result in HBM.
      fill: share of a grouped matmul's rows that hold tokens.
    """
    names = f"{call.name} {call.op_name}".lower()
    if "metadata" in call.name:
        return KernelWork("metadata", 0.0, moved)
    matrices = [
        operand.shapes[0]
        for operand in comp.operands(call)
        if len(operand.shapes) == 1
        and len(operand.shapes[0].dims) >= 2
        and operand.shapes[0].dtype not in ("s8", "s16", "s32", "u32", "pred")
    ]
    if "splash" in names or "flash" in names:
        shapes = [s for operand in comp.operands(call) for s in operand.shapes]
        return _attention(call, names, shapes, matrices, moved)
    if "gmm" in names or "ragged-dot" in names or "ragged_dot" in names:
        found = _grouped(call, matrices, fill)
        if found is not None:
            return found
    kind = re.sub(r"[.\d]+$", "", call.name)
    return KernelWork(kind, 0.0, moved, known=False)


def visited_share(product: Instruction, fill: float) -> float:
    """Share of its iterations that a product does: 1 unless it skips groups."""
    attributes = product.attributes
    if '"ITERATION_SKIPPER_MODE_GROUP_STARTS"' not in attributes:
        return 1.0
    places = re.search(r'"mask_dim_to_iteration_index":\["(\d+)","(\d+)"\]', attributes)
    bounds = re.search(r'"iteration_bounds":\[([0-9",]+)\]', attributes)
    if not places or not bounds:
        return 1.0
    sizes = [int(n) for n in re.findall(r"\d+", bounds[1])]
    groups, tiles = (sizes[int(place)] for place in places.groups())
    return min(1.0, (fill * tiles + groups - 1) / (groups * tiles))


def _attention(
    call: Instruction, names: str, shapes, matrices, moved: float
) -> KernelWork:
    """Products of the tiles visited. Forward 2, dq 3, dkv 4 (with dq in it: 5).

    Some are as wide as a key, the others as a value: scores, dq and dk, or mixing, the
    gradient of the weights and dv.
    """
    heads = [s for s in matrices if len(s.dims) in (3, 4)]
    if len(heads) < 2:
        return KernelWork("attention", 0.0, moved, known=False)
    q, k, v = (*heads, heads[1])[:3]
    rows, keys, width = q.dims[-2], k.dims[-2], q.dims[-1]
    tile_q, tile_k = (
        re.search(rf'block_{side}(?:_dq|_dkv)?\\?"?:\s*(\d+)', call.attributes)
        for side in ("q", "kv")
    )
    by_key, by_value, over = 1, 1, tile_q
    if "dkv" in names:
        # A gradient more among the results is that of the queries.
        fused = "fused" in names or len(call.shapes) > 4
        by_key, by_value, over = 3 if fused else 2, 2, tile_k
    elif "dq" in names or ("bwd" in names and "fwd" not in names):
        by_key = 2
    pairs = q.size // (rows * width)
    if tile_q and tile_k:
        by_rows = "dkv" not in names
        tables = [s.dims for s in shapes if s.dtype == "s8" and len(s.dims) == 3]
        wide = tables[0][2 if by_rows else 1] if tables else keys
        pairs *= _visited(rows, keys, int(tile_q[1]), int(tile_k[1]), wide, by_rows)
        if k.memory_space == HBM:
            # Two blocks of one side are read again for each of the other.
            one = (width + v.dims[-1]) * k.nbytes / k.size
            moved += pairs / int(over[1]) * one
    else:
        pairs *= rows * (keys - rows / 2)
    widths = by_key * width + by_value * v.dims[-1]
    return KernelWork("attention", float(2 * pairs * widths), moved)


def _visited(
    rows: int, keys: int, tile_q: int, tile_k: int, wide: int, by_rows: bool
) -> int:
    """Scores in the tiles that causality leaves, `wide` at most for one of a side.

    Where the row is split over devices it is the last part's: the others wait for it.
    A window narrows the grid, but for the derivative in one kernel, whose tiles before
    the window are counted though it skips them.

    Args:
      rows: queries.
      keys: of the whole row.
      tile_q: queries of a tile.
      tile_k: keys of a tile.
      wide: tiles of the grid along keys for a tile of queries, or the reverse.
      by_rows: whether it is along keys.
    """
    ends = range(keys - rows + tile_q, keys + 1, tile_q)
    tiles = [-(-end // tile_k) for end in ends]
    if by_rows:
        counts = [min(count, wide) for count in tiles]
    else:
        blocks = range(-(-keys // tile_k))
        counts = [min(sum(count > j for count in tiles), wide) for j in blocks]
    return tile_q * tile_k * sum(counts)


def _tile(call: Instruction) -> tuple[int, int, int]:
    """(tm, tk, tn) as XLA's own kernel or megablox' metadata give it."""
    tiling = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', call.attributes)
    if tiling:
        return tuple(int(n) for n in tiling.groups())
    sizes = [re.search(rf'tile_{d}\\?"?:\s*(\d+)', call.attributes) for d in "mkn"]
    return tuple(int(s[1]) for s in sizes) if all(sizes) else _DEFAULT_TILE


def _grouped(call: Instruction, matrices, fill: float) -> KernelWork | None:
    flat = [s for s in matrices if len(s.dims) == 2]
    stacked = [s for s in matrices if len(s.dims) == 3]
    out = call.shapes[0]
    if flat and stacked and len(out.dims) == 2:
        (m, k), n, groups, kind = flat[0].dims, out.dims[1], stacked[0].dims[0], "gmm"
    elif len(flat) >= 2 and len(out.dims) == 3:
        groups, k, n = out.dims
        a, b = flat[0].dims, flat[1].dims
        m, kind = (a[0] if a[0] == b[0] else a[1]), "tgmm"
    else:
        return None
    tm, tk, tn = (min(t, size) for t, size in zip(_tile(call), (m, k, n), strict=True))
    rows = m * fill
    tiles = rows / tm + groups - 1
    k_tiles, n_tiles = -(-k // tk), -(-n // tn)
    done = 2.0 * tiles * tm * (k_tiles * tk) * (n_tiles * tn)
    if kind == "gmm":
        weights = (groups if k_tiles == 1 else tiles) * k * n
        moved = rows * k * n_tiles + weights + rows * n
    else:
        moved = rows * k * n_tiles + rows * n * k_tiles + groups * k * n
    return KernelWork(kind, done, 2.0 * moved)
