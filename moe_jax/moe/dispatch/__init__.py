"""Dispatches: carry rows to their experts and combine what comes back.

Each is `(options, rows, routing, experts, axes) -> (y_td, DispatchStats)`, a pure
function of one shard's tokens inside `jax.shard_map` (or of all tokens where `axes`
is empty). It is the only home of the collectives of the MoE layer.

All give the same result where nothing is dropped; those in `MAY_DROP` may drop, and
count it.
"""

from moe_jax.moe.dispatch import (
    auto,
    bucket,
    dense,
    einsum,
    exact,
    gather,
    ragged,
    ring,
)

DISPATCHES = {
    dense.DenseDispatch: dense.dispatch,
    einsum.Einsum: einsum.dispatch,
    bucket.Bucket: bucket.dispatch,
    exact.Exact: exact.dispatch,
    ragged.Ragged: ragged.dispatch,
    gather.Gather: gather.dispatch,
    ring.Ring: ring.dispatch,
    auto.Auto: auto.dispatch,
}

MAY_DROP = (bucket.Bucket, einsum.Einsum)
