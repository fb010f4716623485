"""Scorers: tokens (and the carry of the last router) to logits per expert.

A scorer is a module built by `(d_model, num_experts, options, rngs)` and called as
`(tokens, carry, key, mode) -> (logits_te, carry)`; its static
`init_carry(options, num_tokens)` gives what the first router of the model receives.
"""

from moe_jax.moe.scorers import linear

SCORERS = {linear.Linear: linear.LinearScorer}
