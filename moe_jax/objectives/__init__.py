"""Training objectives, one a file.

Each is `(options, model, params, router_state, batch, *, key, mode, override, average)
-> Loss`; `average` are the averaged parameters, for one whose config has
`uses_average`, else None.
"""

from moe_jax.objectives import denoising, next_token

OBJECTIVES = {
    next_token.NextToken: next_token.loss,
    denoising.Denoising: denoising.loss,
}
