"""Selectors: logits to `Routing`, as pure functions in the global view.

Each is `(options, logits_te, tokens, router_state, mode, override, key) -> Routing`.
"""

from moe_jax.moe.selectors import top_k

SELECTORS = {top_k.TopK: top_k.select}
