"""What a noise may change; each of them changes one of the three."""

import jax
from flax import nnx

from moe_jax.moe.routing import Array, Mode, Override, Routing, Tokens


class Noise(nnx.Module):
    """Changes nothing.

    Methods get a key, and are told the mode: noise acts in training only.
    """

    def features(self, tokens: Tokens, key: jax.Array, mode: Mode) -> Tokens:
        """What the scorer sees of the tokens; the experts see them as they are."""
        return tokens

    def logits(
        self, logits_te: Array, tokens: Tokens, key: jax.Array, mode: Mode
    ) -> tuple[Array, Array] | None:
        """The noisy logits (T, E) and the deviation of their noise, or None."""
        return None

    def choice(
        self,
        routing: Routing,
        tokens: Tokens,
        override: Override | None,
        key: jax.Array,
        mode: Mode,
    ) -> Array | None:
        """Experts (T, K) in place of the chosen ones, or None."""
        return None
