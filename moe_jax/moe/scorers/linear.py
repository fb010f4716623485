"""The linear router of Shazeer et al. 2017: `logits = x W`, or `x W + b`."""

import jax
from flax import nnx

from moe_jax import config
from moe_jax.moe.routing import Array, Mode, Tokens
from moe_jax.nn import module
from moe_jax.parallel import rules


@config.node
class Linear(config.ScorerConfig):
    """One matrix.

    Attributes:
      init_std: deviation of the initial weights; 0: uniform within 1 / sqrt(D), as a
        gate of DiT-MoE begins.
      dtype: of the weights and the product; float32 because the choice of experts
        flips on differences that bfloat16 does not hold.
      bias: add a learned vector, which begins at zero (GPT-OSS).
    """

    init_std: float = 0.02
    dtype: str = "float32"
    bias: bool = False

    def problems(self, path, root):
        yield from config.dtype_problems(self, path, "dtype")
        if self.init_std < 0:
            yield f"{path}.init_std={self.init_std}: must not be negative"


class LinearScorer(nnx.Module):
    """`logits_te = x_td W_de + b_e`."""

    def __init__(self, d_model: int, num_experts: int, options: Linear, rngs: nnx.Rngs):
        self.dtype = options.dtype
        self.w = module.param(
            rngs,
            (d_model, num_experts),
            ("embed", None),
            std=options.init_std or module.uniform(d_model**-0.5),
            dtype=options.dtype,
        )
        if options.bias:
            self.b = module.param(rngs, (num_experts,), (None,), dtype=options.dtype)

    @staticmethod
    def init_carry(options: Linear, num_tokens: int) -> None:
        """Nothing passes from layer to layer."""
        return None

    def __call__(
        self, tokens: Tokens, carry: None, key: jax.Array | None, mode: Mode
    ) -> tuple[Array, None]:
        """Returns logits (T, E)."""
        logits_te = tokens.features.astype(self.dtype) @ rules.whole(self.w[...])
        if hasattr(self, "b"):
            logits_te = logits_te + self.b[...]
        return logits_te, carry
