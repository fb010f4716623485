"""Scorers that see the time alone: all tokens of an image have the same logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe.routing import Array, Condition, Mode, Tokens
from moe_jax.moe.scorers.linear import Linear, LinearScorer
from moe_jax.moe.scorers.mlp import MLP, MLPScorer
from moe_jax.nn import feedforward
from moe_jax.parallel import rules


@config.node
class Timestep(config.ScorerConfig):
    """`silu(e) W + b` of the time's embedding e (Switch-DiT, Park et al. 2024).

    Attributes:
      init_std: deviation of the initial weights; 0: uniform within 1 / sqrt(D).
      dtype: of the weights and the product.
    """

    by_time = True
    init_std: float = 0.02
    dtype: str = "float32"

    def problems(self, path, root):
        yield from config.dtype_problems(self, path, "dtype")
        if self.init_std < 0:
            yield f"{path}.init_std={self.init_std}: must not be negative"


@config.node
class TimestepMLP(config.ScorerConfig):
    """`act(e W_in) W_out` of the time's embedding e (MoDE, Reuss et al. 2024).

    Attributes:
      hidden: width of the hidden layer; 0: 2 D.
      activation: one of `nn.feedforward.ACTIVATIONS`.
      init_std: deviation of the initial weights.
      dtype: of the weights and the products.
    """

    by_time = True
    hidden: int = 0
    activation: str = "gelu"
    init_std: float = 0.02
    dtype: str = "float32"

    def problems(self, path, root):
        yield from config.dtype_problems(self, path, "dtype")
        yield from feedforward.activation_problems(self.activation, path)
        if self.hidden < 0:
            yield f"{path}.hidden={self.hidden}: must not be negative"
        if self.init_std <= 0:
            yield f"{path}.init_std={self.init_std}: must be positive"


def logits(embedding: Array, w: Array, b: Array) -> Array:
    """`silu(e) W + b` in the type of W.

    Args:
      embedding: (B, D).
      w: (D, E), or (L, D, E) of L layers.
      b: (E,), or (L, E).

    Returns:
      (B, E), or (L, B, E).
    """
    hidden = jax.nn.silu(embedding.astype(w.dtype))
    return hidden @ rules.whole(w) + b[..., None, :]


def images(tokens: Tokens, scorer: str) -> Array:
    """(B, D), the embedding of each image's time.

    Raises:
      ValueError: tokens without a time.
    """
    if not isinstance(tokens.condition, Condition):
        raise ValueError(
            f"{scorer} scores the time of a noisy image, and these tokens have none: "
            "pass a condition, or choose another scorer"
        )
    embedding = tokens.condition.time_embedding
    return embedding.reshape(*tokens.batch_shape, -1)[:, 0]


def of_tokens(logits_be: Array, tokens: Tokens) -> Array:
    """(B, E) -> (T, E): a token's logits are those of its image."""
    rows, length = tokens.batch_shape
    shape = (rows, length, logits_be.shape[-1])
    return jnp.broadcast_to(logits_be[:, None], shape).reshape(rows * length, -1)


class TimestepScorer(LinearScorer):
    """See `Timestep`."""

    def __init__(
        self, d_model: int, num_experts: int, options: Timestep, rngs: nnx.Rngs
    ):
        made = Linear(init_std=options.init_std, dtype=options.dtype, bias=True)
        super().__init__(d_model, num_experts, made, rngs)

    def __call__(
        self, tokens: Tokens, carry: None, key: jax.Array | None, mode: Mode
    ) -> tuple[Array, None]:
        """Returns logits (T, E)."""
        found = logits(images(tokens, "Timestep"), self.w[...], self.b[...])
        return of_tokens(found, tokens), carry


class TimestepMLPScorer(MLPScorer):
    """See `TimestepMLP`."""

    def __init__(
        self, d_model: int, num_experts: int, options: TimestepMLP, rngs: nnx.Rngs
    ):
        made = MLP(
            hidden=options.hidden or 2 * d_model,
            activation=options.activation,
            init_std=options.init_std,
            dtype=options.dtype,
        )
        super().__init__(d_model, num_experts, made, rngs)

    def __call__(
        self, tokens: Tokens, carry: None, key: jax.Array | None, mode: Mode
    ) -> tuple[Array, None]:
        """Returns logits (T, E)."""
        embedding = images(tokens, "TimestepMLP")
        alone = Tokens(
            features=embedding,
            valid=tokens.valid[: len(embedding)],
            batch_shape=(len(embedding), 1),
        )
        found, carry = super().__call__(alone, carry, key, mode)
        return of_tokens(found, tokens), carry
