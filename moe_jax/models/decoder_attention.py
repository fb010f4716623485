"""The attention of the decoder's blocks, from its config."""

from typing import Any

from moe_jax.models.decoder_config import Decoder
from moe_jax.nn.attention.latent import LatentSelfAttention
from moe_jax.nn.attention.layer import Attention, SelfAttention


def attention_of(options: Decoder, window: int, **shared: Any) -> SelfAttention:
    """The attention of a block whose queries see `window` positions; 0: all before.

    Args:
      options: of the decoder.
      window: of the block.
      shared: `std`, `out_std`, `dtype` and `rngs`; see `Attention`.
    """
    shared |= dict(
        rope=options.rope,
        window=window,
        softcap=options.attention_softcap,
        sinks=options.sinks,
        output_bias=options.attention_output_bias,
        norm_eps=options.norm_eps,
    )
    sizes = options.d_model, options.num_heads
    if options.latent is not None:
        return LatentSelfAttention(*sizes, options.latent, options.attention, **shared)
    return Attention(
        *sizes,
        options.kv_heads,
        options.width_per_head,
        options.attention,
        qk_norm=options.qk_norm,
        bias=options.attention_bias,
        clip=options.clip_qkv,
        **shared,
    )
