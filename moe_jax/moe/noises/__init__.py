"""Noise in a router, in training only; combines with every selector that allows it.

A noise is a module built by `(d_model, num_experts, options, rngs)`, see `base.Noise`:
it changes what the scorer sees, the logits, or the choice.
"""

from moe_jax.moe.noises import (
    epsilon_greedy,
    gaussian,
    input_jitter,
    learned_gaussian,
    sampled_experts,
)

NOISES = {
    input_jitter.InputJitter: input_jitter.Jitter,
    gaussian.Gaussian: gaussian.GaussianNoise,
    learned_gaussian.LearnedGaussian: learned_gaussian.LearnedGaussianNoise,
    epsilon_greedy.EpsilonGreedy: epsilon_greedy.Explore,
    sampled_experts.SampledExperts: sampled_experts.Sample,
}
