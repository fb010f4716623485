"""Phi-3.5-MoE: LayerNorm, biases, two experts by SparseMixer, LongRoPE."""

from moe_jax.convert.hf import common, table
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.sparse_mixer_v2 import SparseMixerV2


def _window(fields: Fields) -> int:
    """0 where no position can lie beyond the window, as in the release."""
    window = fields.integer("sliding_window", 0)
    return window if window < fields.integer("max_position_embeddings", 131072) else 0


def _decoder(fields: Fields) -> Decoder:
    bias = fields.flag("attention_bias", False)
    return Decoder(
        **common.shapes(fields),
        **common.heads(fields),
        feed_forward=MoE(
            num_experts=fields.integer("num_local_experts"),
            experts=ExpertFeedForward(
                d_ff=fields.integer("intermediate_size"),
                activation=common.activation(fields),
            ),
            selector=SparseMixerV2(
                top_k=fields.only("num_experts_per_tok", 2),
                eps=fields.number("router_jitter_noise", 0.01),
            ),
            balance=common.pooled_balance(fields, 0.001),
        ),
        norm="layer",
        rope=common.rotary(fields, 1e6),
        attention_bias=bias,
        attention_output_bias=bias,
        output_bias=fields.flag("lm_head_bias", False),
        window=_window(fields),
    )


def _fields(options: Decoder) -> dict:
    moe = options.feed_forward
    return {
        **common.shape_fields(options),
        **common.head_fields(options),
        **common.rotary_fields(options.rope),
        **common.pooled_fields(moe),
        "intermediate_size": moe.experts.d_ff,
        "hidden_act": common.activation_name(moe.experts.activation),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.selector.top_k,
        "router_jitter_noise": moe.selector.eps,
        "attention_bias": options.attention_bias,
        "lm_head_bias": options.output_bias,
        "sliding_window": options.window or None,
    }


FAMILY = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    decoder=_decoder,
    fields=_fields,
    block=(*table.NORMS, *table.ATTENTION, *table.MIXTRAL_EXPERTS),
)
