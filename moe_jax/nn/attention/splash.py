"""Attention by the Pallas kernel for TPUs that comes with JAX ("splash attention").

It visits the blocks of scores that causality and a window leave, or all of them, and
keeps them on the chip; its derivative keeps the output and the log-sum-exp. The kernel
takes heads of any width (below 128 they are filled up in the chip's registers), values
of another width than keys, caps, sinks, and rows of whole lanes.
"""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from moe_jax import config
from moe_jax.nn.attention import blocked
from moe_jax.nn.attention.common import ATTENDED, PLAIN, Call, Scoring, Segments
from moe_jax.parallel.mesh import platform

LANES = 128


@config.node
class Splash(config.AttentionConfig):
    """A kernel for TPUs; elsewhere `Blocked` computes the same.

    Each block is taken as large as it divides the row, and at most this large.

    Attributes:
      block_q: queries at a time, a multiple of 128.
      block_kv: keys and values at a time, a multiple of 128.
      fused_backward: one kernel for all gradients: fewer FLOPs, but the parts of the
        queries' gradient are kept for each block of keys.
    """

    block_q: int = 512
    block_kv: int = 512
    fused_backward: bool = False

    def problems(self, path, root):
        for name in ("block_q", "block_kv"):
            size = getattr(self, name)
            if size < LANES or size % LANES:
                yield f"{path}.{name}={size}: must be a multiple of {LANES}"
        length, context = root.positions(), max(1, root.mesh.context)
        if length // context % LANES:
            yield (
                f"{path}=Splash takes multiples of {LANES} positions on a shard, but "
                f"{length} over config.mesh.context={context} is {length // context}; "
                f"take rows of a multiple of {LANES * context} "
                f"(config.data.sequence_length), or set {path} to Auto()"
            )


def misfit(call: Call) -> str:
    """Why the kernel does not take a call; "" where it does."""
    if call.queries % LANES or not call.queries:
        return f"{call.queries} positions on a shard are no multiple of {LANES}"
    return ""


def block_size(most: int, length: int) -> int:
    """The largest multiple of 128 up to `most` that divides `length`."""
    sizes = range(LANES, min(most, length) + 1, LANES)
    return max(size for size in sizes if length % size == 0)


def attend(
    options: Splash,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    scoring: Scoring = PLAIN,
    interpret: bool = False,
) -> jax.Array:
    """See `ATTENTIONS`; `interpret` runs the kernel's code on any platform."""
    if platform() != "tpu" and not interpret:
        return blocked.attend(blocked.Blocked(), q, k, v, segments, scoring)
    kernel = _kernel(options, q.shape[1], k.shape[1], scoring, interpret)
    if scoring.causal:
        shards = k.shape[1] // q.shape[1]
        kernel = _of_shard(kernel, segments.first // q.shape[1], shards)

    # The kernel gives their gradient in the type of the queries.
    sinks = None if scoring.sinks is None else scoring.sinks.astype(q.dtype)

    def one(q, k, v, queries, keys):
        documents = kernels.SegmentIds(q=queries, kv=keys)
        return kernel(q, k, v, segment_ids=documents, sinks=sinks)

    heads_first = lambda x: x.swapaxes(1, 2)
    given = map(heads_first, (q, k, v))
    return heads_first(jax.vmap(one)(*given, segments.queries, segments.keys))


def _kernel(options: Splash, queries: int, keys: int, scoring: Scoring, interpret):
    """The kernel for a row of `keys` positions, cut into shards of `queries`."""
    block_q, block_kv = (
        block_size(options.block_q, queries),
        block_size(options.block_kv, keys),
    )
    apart = (
        {} if options.fused_backward else dict(block_q_dq=block_q, block_kv_dq=block_kv)
    )
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        use_fused_bwd_kernel=options.fused_backward,
        **apart,
    )
    shards, mask = keys // queries, masks.CausalMask((keys, keys))
    if not scoring.causal:
        # All shards see the same: the kernel is that of their queries.
        shards, mask = 1, masks.FullMask((queries, keys))
    if scoring.window:
        mask = masks.LocalMask((keys, keys), (scoring.window - 1, 0), 0)
    # One mask serves all heads.
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask]),
        block_sizes=sizes,
        attn_logits_soft_cap=scoring.softcap or None,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )


def _of_shard(kernel, index: jax.Array | int, shards: int):
    """The kernel with the part of its tables that belongs to a shard of the queries."""
    if shards == 1:
        return kernel

    def part(table):
        # (1, query blocks, key blocks), or (queries,).
        axis = min(1, table.ndim - 1)
        size = table.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(table, index * size, size, axis)

    return jax.tree.map(part, kernel)
