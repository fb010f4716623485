"""OLMoE: many small experts, weights as they are, norms over whole projections."""

from moe_jax.convert.hf import common, table
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK


def _decoder(fields: Fields) -> Decoder:
    bias = fields.flag("attention_bias", False)
    return Decoder(
        **common.shapes(fields),
        **common.heads(fields),
        feed_forward=MoE(
            num_experts=fields.integer("num_experts"),
            experts=ExpertFeedForward(
                d_ff=fields.integer("intermediate_size"),
                activation=common.activation(fields),
            ),
            selector=TopK(
                top_k=fields.integer("num_experts_per_tok"),
                renormalize=fields.flag("norm_topk_prob", False),
            ),
            balance=common.pooled_balance(fields, 0.01),
        ),
        qk_norm="projection",
        clip_qkv=fields.number("clip_qkv", 0.0),
        rope=common.rotary(fields, 10000.0),
        attention_bias=bias,
        attention_output_bias=bias,
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
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.selector.top_k,
        "norm_topk_prob": moe.selector.renormalize,
        "clip_qkv": options.clip_qkv or None,
        "attention_bias": options.attention_bias,
    }


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    decoder=_decoder,
    fields=_fields,
    block=(
        *table.NORMS,
        *table.ATTENTION,
        *table.PROJECTION_NORMS,
        *table.ROUTER,
        *table.EXPERTS,
    ),
)
