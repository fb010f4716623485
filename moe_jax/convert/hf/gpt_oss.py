"""GPT-OSS: sinks, a window in every other layer, clamped experts with biases.

Gates and ups of all experts lie in one tensor, in turn.
"""

from moe_jax.convert.hf import common, table
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.convert.hf.table import Weight
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors.top_k import TopK


def _decoder(fields: Fields) -> Decoder:
    bias = fields.flag("attention_bias", True)
    fields.only("hidden_act", "silu")  # What it says is not what is computed.
    fields.only("swiglu_alpha", 1.702)
    layers = common.num_layers(fields)
    names = ["sliding_attention", "full_attention"] * layers
    types = fields.items("layer_types", names[:layers])
    return Decoder(
        **common.shapes(fields),
        **common.heads(fields),
        **common.layer_pattern(fields, types, fields.integer("sliding_window", 0)),
        feed_forward=MoE(
            num_experts=fields.integer("num_local_experts"),
            experts=ExpertFeedForward(
                d_ff=fields.integer("intermediate_size"),
                activation="quick_gelu",
                bias=True,
                clamp=fields.number("swiglu_limit", 7.0),
                up_offset=1.0,
            ),
            scorer=Linear(bias=True),
            selector=TopK(top_k=fields.integer("num_experts_per_tok"), softmax="after"),
            balance=common.pooled_balance(fields, 0.9),
        ),
        rope=common.rotary(fields, 150000.0),
        sinks=True,
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
        "hidden_act": "silu",
        "swiglu_alpha": 1.702,
        "swiglu_limit": moe.experts.clamp,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.selector.top_k,
        "experts_per_token": moe.selector.top_k,
        "attention_bias": options.attention_bias,
        "sliding_window": options.window or None,
        "layer_types": common.layer_types(options),
    }


_IN, _OUT = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    decoder=_decoder,
    fields=_fields,
    block=(
        *table.NORMS,
        *table.ATTENTION,
        Weight("self_attn.sinks", "attention/sinks", "h->h"),
        Weight("mlp.router.weight", "moe/scorer/w", "ed->de"),
        Weight("mlp.router.bias", "moe/scorer/b", "e->e"),
        Weight(_IN, "moe/experts/w_gate", "edf->edf", part=0, parts=2),
        Weight(_IN, "moe/experts/w_up", "edf->edf", part=1, parts=2),
        Weight(f"{_IN}_bias", "moe/experts/b_gate", "ef->ef", part=0, parts=2),
        Weight(f"{_IN}_bias", "moe/experts/b_up", "ef->ef", part=1, parts=2),
        Weight(_OUT, "moe/experts/w_down", "efd->efd"),
        Weight(f"{_OUT}_bias", "moe/experts/b_down", "ed->ed"),
    ),
)
