"""Masks on what a block of a denoiser works on, chosen by the time of the noise.

With a mask m a block computes its residuals from `m * x` and adds them to x. A mask is
a module built by `(d_model, options, dtype, rngs)`, one a block, and called as
`(x, condition) -> m`: (B, S, D) and a `Condition` with a row an image, to what
broadcasts against x. `LOSSES` has losses that belong to one mask,
`(options, embed, routers, condition, valid, key) -> {name: weighted loss}`.
"""

from moe_jax.models.masks import diffusion_prior, switch_dit, task_routing

MASKS = {
    switch_dit.SwitchDiT: switch_dit.SwitchMask,
    task_routing.TaskRouting: task_routing.ChannelMask,
}

LOSSES = {switch_dit.SwitchDiT: diffusion_prior.losses}
