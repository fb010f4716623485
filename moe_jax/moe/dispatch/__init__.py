"""Dispatches: carry rows to their experts and combine what comes back.

Each is `(options, rows, routing, experts, axes) -> (y_td, DispatchStats)`, a pure
function of one shard's tokens inside `jax.shard_map` (or of all tokens where `axes`
is empty). It is the only home of the collectives of the MoE layer.
"""

from moe_jax.moe.dispatch import bucket, dense, exact

DISPATCHES = {
    dense.DenseDispatch: dense.dispatch,
    bucket.Bucket: bucket.dispatch,
    exact.Exact: exact.dispatch,
}
