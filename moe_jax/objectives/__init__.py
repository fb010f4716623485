"""Training objectives, one a file.

Each is `(options, model, params, router_state, batch, key, mode, override) -> Loss`.
"""

from moe_jax.objectives import next_token

OBJECTIVES = {next_token.NextToken: next_token.loss}
