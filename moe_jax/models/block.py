"""What a decoder is made of: its blocks, and what stands outside of them."""

import math

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax.models.base import Output, TokenInputs
from moe_jax.models.decoder_attention import attention_of
from moe_jax.models.decoder_config import Decoder
from moe_jax.models.remat import INPUT
from moe_jax.models.segments import Kind
from moe_jax.moe.layer import MoE, MoELayer
from moe_jax.nn import embedding, feedforward, module, norms
from moe_jax.parallel import rules


def norm_of(options: Decoder, rngs: nnx.Rngs) -> nnx.Module:
    """The decoder's kind of norm, over D."""
    make = norms.NORMS[options.norm]
    return make(
        options.d_model, eps=options.norm_eps, dtype=options.param_dtype, rngs=rngs
    )


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, options: Decoder, kind: Kind, *, rngs: nnx.Rngs):
        out_std = options.init_std / math.sqrt(2 * options.num_layers)
        shared = dict(std=options.init_std, out_std=out_std, dtype=options.param_dtype)
        self.is_moe = kind.moe
        self.attention_norm = norm_of(options, rngs)
        self.attention = attention_of(options, kind.window, rngs=rngs, **shared)
        self.feed_forward_norm = norm_of(options, rngs)
        ff = options.feed_forward
        if kind.moe:
            self.moe = MoELayer(options.d_model, ff, rngs=rngs, **shared)
        else:
            if isinstance(ff, MoE):
                ff = ff.dense(ff.dense_d_ff)
            self.feed_forward = feedforward.FeedForward(
                options.d_model, ff, rngs=rngs, **shared
            )

    def __call__(
        self, x, inputs: TokenInputs, state, carry, cache, start, key, mode, override
    ):
        """(B, S, D) in and out; also the router's carry, the cache and MoEAux."""
        x = checkpoint_name(x, INPUT)
        with jax.named_scope("attention"):
            attended, cache = self.attention(
                self.attention_norm(x), inputs.positions, inputs.segments, cache, start
            )
        x = rules.constrain(x + attended, "batch", "sequence", None)
        normed, aux = self.feed_forward_norm(x), None
        if self.is_moe:
            y, carry, aux = self.moe(
                normed,
                router_state=state,
                valid=inputs.segments > 0,
                token_ids=inputs.tokens,
                positions=inputs.positions,
                segments=inputs.segments,
                carry=carry,
                key=key,
                mode=mode,
                override=override,
            )
        else:
            with jax.named_scope("feed_forward"):
                y = self.feed_forward(normed)
        return rules.constrain(x + y, "batch", "sequence", None), carry, cache, aux


class Outer(nnx.Module):
    """What stands outside the blocks: embedding, last norm, output matrix."""

    def __init__(self, options: Decoder, *, rngs: nnx.Rngs):
        vocab, d_model = options.vocab_size, options.d_model
        dtype = options.param_dtype
        self.embedding = module.param(
            rngs,
            (vocab, d_model),
            ("vocab", "embed"),
            std=options.init_std,
            dtype=dtype,
        )
        self.norm = norm_of(options, rngs)
        self.tied, self.softcap = options.tie_embeddings, options.logit_softcap
        if not options.tie_embeddings:
            self.output = module.param(
                rngs,
                (d_model, vocab),
                ("embed", "vocab"),
                std=options.init_std,
                dtype=dtype,
                whole=True,
            )
        if options.output_bias:
            self.output_bias = module.param(rngs, (vocab,), ("vocab",), dtype=dtype)

    def embed(self, tokens: jax.Array, dtype: str) -> jax.Array:
        with jax.named_scope("embedding"):
            return embedding.lookup(self.embedding[...], tokens, dtype)

    def output_of(self, normed: jax.Array) -> Output:
        matrix = self.embedding if self.tied else self.output
        bias = self.output_bias[...] if hasattr(self, "output_bias") else None
        return Output(normed, matrix[...], matrix.axes, bias, self.softcap)
