"""A router with one hidden layer: `logits = act(x W_in) W_out`."""

import jax
from flax import nnx

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Tokens
from moe_jax.nn import feedforward, module
from moe_jax.parallel import rules


@config.node
class MLP(config.ScorerConfig):
    """Two matrices without biases (the trunk of Race-DiT, Yuan et al. 2025).

    Attributes:
      hidden: width of the hidden layer.
      activation: one of `nn.feedforward.ACTIVATIONS`.
      init_std: deviation of the initial weights.
      dtype: of the weights and the products.
    """

    hidden: int = 256
    activation: str = "gelu"
    init_std: float = 0.02
    dtype: str = "float32"

    def problems(self, path, root):
        yield from config.dtype_problems(self, path, "dtype")
        yield from feedforward.activation_problems(self.activation, path)
        if self.hidden < 1:
            yield f"{path}.hidden={self.hidden}: must be at least 1"
        if self.init_std <= 0:
            yield f"{path}.init_std={self.init_std}: must be positive"


class MLPScorer(nnx.Module):
    """`logits_te = act(x_td W_dh) W_he`."""

    def __init__(self, d_model: int, num_experts: int, options: MLP, rngs: nnx.Rngs):
        self.dtype = options.dtype
        self.act = feedforward.ACTIVATIONS[options.activation]
        normal = dict(std=options.init_std, dtype=options.dtype)
        shape = (d_model, options.hidden)
        self.w_in = module.param(rngs, shape, ("embed", None), **normal)
        shape = (options.hidden, num_experts)
        self.w_out = module.param(rngs, shape, (None, None), **normal)

    @staticmethod
    def init_carry(options: MLP, num_tokens: int) -> None:
        """Nothing passes from layer to layer."""
        return None

    def __call__(
        self, tokens: Tokens, carry: None, key: jax.Array | None, mode: Mode
    ) -> tuple[Array, None]:
        """Returns logits (T, E)."""
        hidden = self.act(
            tokens.features.astype(self.dtype) @ rules.whole(self.w_in[...])
        )
        return hidden @ self.w_out[...], carry
