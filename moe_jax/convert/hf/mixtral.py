"""Mixtral: top-2 of 8, renormalised; a window in some releases."""

from moe_jax.convert.hf import common, table
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK


def _decoder(fields: Fields) -> Decoder:
    return Decoder(
        **common.shapes(fields),
        **common.heads(fields),
        feed_forward=MoE(
            num_experts=fields.integer("num_local_experts"),
            experts=ExpertFeedForward(
                d_ff=fields.integer("intermediate_size"),
                activation=common.activation(fields),
            ),
            selector=TopK(top_k=fields.integer("num_experts_per_tok")),
            balance=common.pooled_balance(fields, 0.001),
        ),
        rope=common.rotary(fields, 1e6),
        window=fields.integer("sliding_window", 0),
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
        "sliding_window": options.window or None,
    }


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    decoder=_decoder,
    fields=_fields,
    block=(*table.NORMS, *table.ATTENTION, *table.MIXTRAL_EXPERTS),
)
