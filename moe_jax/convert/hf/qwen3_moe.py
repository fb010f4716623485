"""Qwen3-MoE: norms of each head, top-k renormalised or not, some layers dense."""

from moe_jax.convert.hf import common, table
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK


def _decoder(fields: Fields) -> Decoder:
    bias = fields.flag("attention_bias", False)
    pattern = common.sparse_pattern(fields)
    experts = fields.integer("num_local_experts", None)  # Its name since version 5.
    dense = fields.integer("intermediate_size", 0)
    slides = fields.flag("use_sliding_window", False)
    window = fields.integer("sliding_window", 0)
    return Decoder(
        **common.shapes(fields),
        **common.heads(fields),
        feed_forward=MoE(
            num_experts=experts or fields.integer("num_experts"),
            experts=ExpertFeedForward(
                d_ff=fields.integer("moe_intermediate_size"),
                activation=common.activation(fields),
            ),
            selector=TopK(
                top_k=fields.integer("num_experts_per_tok"),
                renormalize=fields.flag("norm_topk_prob", False),
            ),
            balance=common.pooled_balance(fields, 0.001),
            dense_d_ff=dense if common.has_dense(pattern) else 0,
            **pattern,
        ),
        qk_norm="head",
        rope=common.rotary(fields, 10000.0),
        attention_bias=bias,
        attention_output_bias=bias,
        window=window if slides else 0,
    )


def _fields(options: Decoder) -> dict:
    moe = options.feed_forward
    return {
        **common.shape_fields(options),
        **common.head_fields(options),
        **common.rotary_fields(options.rope),
        **common.pooled_fields(moe),
        **common.sparse_fields(options),
        **({"intermediate_size": moe.dense_d_ff} if moe.dense_d_ff else {}),
        "moe_intermediate_size": moe.experts.d_ff,
        "hidden_act": common.activation_name(moe.experts.activation),
        "num_experts": moe.num_experts,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.selector.top_k,
        "norm_topk_prob": moe.selector.renormalize,
        "attention_bias": options.attention_bias,
        "use_sliding_window": options.window > 0,
        "sliding_window": options.window or None,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    decoder=_decoder,
    fields=_fields,
    block=(
        *table.NORMS,
        *table.ATTENTION,
        *table.HEAD_NORMS,
        *table.DENSE,
        *table.ROUTER,
        *table.EXPERTS,
    ),
)
