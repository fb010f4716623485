"""Scorers: tokens (and the carry of the last router) to logits per expert.

A scorer is a module built by `(d_model, num_experts, options, rngs)` and called as
`(tokens, carry, key, mode) -> (logits_te, carry)`; its static
`init_carry(options, num_tokens)` gives what the first router of the model receives.
For a selector with slots, `num_experts` is the number of slots of all experts.
"""

from moe_jax.moe.scorers import cosine, linear, mlp, no_scores, timestep

SCORERS = {
    linear.Linear: linear.LinearScorer,
    cosine.Cosine: cosine.CosineScorer,
    mlp.MLP: mlp.MLPScorer,
    no_scores.NoScores: no_scores.NoScorer,
    timestep.Timestep: timestep.TimestepScorer,
    timestep.TimestepMLP: timestep.TimestepMLPScorer,
}
