"""Qwen2-MoE: shared experts behind a gate, biases of queries, keys and values."""

from moe_jax.convert.hf import common, table
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.convert.hf.table import Weight
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK


def _decoder(fields: Fields) -> Decoder:
    pattern = common.sparse_pattern(fields)
    dense = fields.integer("intermediate_size", 0)
    return Decoder(
        **common.shapes(fields),
        **common.heads(fields),
        **_windows(fields),
        feed_forward=MoE(
            num_experts=fields.integer("num_experts"),
            experts=ExpertFeedForward(
                d_ff=fields.integer("moe_intermediate_size"),
                activation=common.activation(fields),
            ),
            selector=TopK(
                top_k=fields.integer("num_experts_per_tok"),
                renormalize=fields.flag("norm_topk_prob", False),
            ),
            shared_d_ff=fields.integer("shared_expert_intermediate_size"),
            shared_gate=True,
            balance=common.pooled_balance(fields, 0.001),
            dense_d_ff=dense if common.has_dense(pattern) else 0,
            **pattern,
        ),
        rope=common.rotary(fields, 10000.0),
        attention_bias=fields.flag("qkv_bias", True),
    )


def _windows(fields: Fields) -> dict[str, int]:
    slides = fields.flag("use_sliding_window", False)
    below = fields.integer("max_window_layers", 28)
    names = [
        "sliding_attention" if i % 2 == 0 and i < below else "full_attention"
        for i in range(common.num_layers(fields))
    ]
    window = fields.integer("sliding_window", 0) if slides else 0
    return common.layer_pattern(fields, fields.items("layer_types", names), window)


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
        "shared_expert_intermediate_size": moe.shared_d_ff,
        "hidden_act": common.activation_name(moe.experts.activation),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.selector.top_k,
        "norm_topk_prob": moe.selector.renormalize,
        "qkv_bias": options.attention_bias,
        "use_sliding_window": options.window > 0,
        "sliding_window": options.window or None,
        "layer_types": common.layer_types(options),
    }


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    decoder=_decoder,
    fields=_fields,
    block=(
        *table.NORMS,
        *table.ATTENTION,
        *table.DENSE,
        *table.ROUTER,
        *table.EXPERTS,
        *table.gated("mlp.shared_expert", "moe/shared"),
        Weight("mlp.shared_expert_gate.weight", "moe/shared_gate", "gd->dg"),
    ),
)
