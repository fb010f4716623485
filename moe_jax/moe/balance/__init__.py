"""Balance: losses on a routing, and the bias that is learned without gradients.

All statistics are sums over tokens in the global view, so over all devices. The
layer calls `losses`, `observe` and `statistics`; the model calls `pooled`,
`init_state`, `update`, and for a step that accumulates `with_step_load`.
"""

from moe_jax.moe.balance.bias import init_state, update
from moe_jax.moe.balance.load import pooled, statistics, with_step_load
from moe_jax.moe.balance.losses import losses, observe
from moe_jax.moe.balance.options import Balance

__all__ = [
    "Balance",
    "init_state",
    "losses",
    "observe",
    "pooled",
    "statistics",
    "update",
    "with_step_load",
]
