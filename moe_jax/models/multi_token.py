"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2).

Module k (from 0) makes of the hidden states after depth k, and of the embeddings of the
tokens k + 1 places on, hidden states that predict the tokens k + 2 places on. The
embedding and the output matrix are those of the main model. As in the published
checkpoints, a module takes hidden states after their last norm, and the embedding
stands first where the two are joined.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.base import TokenInputs
from moe_jax.models.block import Block, norm_of
from moe_jax.models.decoder_config import Decoder
from moe_jax.models.segments import Kind
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import MoEAux
from moe_jax.nn import linear, module
from moe_jax.parallel import rules


class MultiToken(nnx.Module):
    """`norm(block(W [norm(embedding); norm(hidden)]))`.

    The block is of the kind of the model's experts, where it has any.
    """

    def __init__(self, options: Decoder, *, rngs: nnx.Rngs):
        d_model = options.d_model
        self.hidden_norm = norm_of(options, rngs)
        self.embedding_norm = norm_of(options, rngs)
        self.project = module.matrix(
            rngs,
            (2 * d_model, d_model),
            ("embed", None),
            std=options.init_std,
            dtype=options.param_dtype,
        )
        kind = Kind(isinstance(options.feed_forward, MoE), options.windows()[-1])
        self.block = Block(options, kind, rngs=rngs)
        self.norm = norm_of(options, rngs)

    def __call__(self, hidden, embedded, inputs: TokenInputs, **of_block):
        """Normed hidden states (B, S, D) of the next depth, and MoEAux.

        Args:
          hidden: (B, S, D) of the depth before, normed.
          embedded: (B, S, D), embeddings of the tokens that this depth sees.
          inputs: those tokens, and whose they are.
          **of_block: what else a block takes.
        """
        joined = (self.embedding_norm(embedded), self.hidden_norm(hidden))
        x = jnp.concatenate(joined, axis=-1)
        (x,) = linear.products(x, ("batch", "sequence", None), (self.project,))
        x = rules.constrain(x, "batch", "sequence", None)
        x, _, _, aux = self.block(x, inputs, cache=None, start=0, **of_block)
        return self.norm(x), aux


def ahead(inputs: TokenInputs, places: int) -> TokenInputs:
    """The tokens that many places on; padding where the document ends before.

    Positions and documents stay those of the place itself.
    """
    shifted = lambda a: jnp.pad(a[:, places:], [(0, 0), (0, places)])
    same = shifted(inputs.segments) == inputs.segments
    return TokenInputs(
        tokens=shifted(inputs.tokens),
        positions=inputs.positions,
        segments=jnp.where(same, inputs.segments, 0),
    )


def targets(
    batch_targets: jax.Array, weights: jax.Array, inputs: TokenInputs, places: int
) -> tuple[jax.Array, jax.Array]:
    """What is predicted that many places beyond the next token.

    Args:
      batch_targets: (B, S) int32, the next token of each place.
      weights: (B, S) float, of those targets.
      inputs: the tokens themselves.
      places: at least 1.

    Returns:
      Targets (B, S), and weights, zero where the document ends before.
    """
    shifted = lambda a: jnp.pad(a[:, places:], [(0, 0), (0, places)])
    held = ahead(inputs, places).segments > 0
    return shifted(batch_targets), jnp.where(held, shifted(weights), 0)


def joined(aux: MoEAux, more: MoEAux) -> MoEAux:
    """Figures over L layers and those of the modules' layers, as one.

    A loss that is pooled over layers, (), is pooled over the modules' own and added.
    """
    join = lambda a, b: jnp.concatenate([a, b]) if a.ndim else a + b
    return jax.tree.map(join, aux, more)
