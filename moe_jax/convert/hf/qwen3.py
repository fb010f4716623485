"""Qwen3, dense: norms of each head's queries and keys."""

from moe_jax.convert.hf import common, table
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.models.decoder_config import Decoder
from moe_jax.nn.feedforward import Dense


def _decoder(fields: Fields) -> Decoder:
    bias = fields.flag("attention_bias", False)
    layers = common.num_layers(fields)
    slides = fields.flag("use_sliding_window", False)
    above = fields.integer("max_window_layers", 28)
    names = [
        "sliding_attention" if i >= above else "full_attention" for i in range(layers)
    ]
    window = fields.integer("sliding_window", 0) if slides else 0
    return Decoder(
        **common.shapes(fields),
        **common.heads(fields),
        **common.layer_pattern(fields, fields.items("layer_types", names), window),
        feed_forward=Dense(
            d_ff=fields.integer("intermediate_size"),
            activation=common.activation(fields),
        ),
        qk_norm="head",
        rope=common.rotary(fields, 10000.0),
        attention_bias=bias,
        attention_output_bias=bias,
    )


def _fields(options: Decoder) -> dict:
    return {
        **common.shape_fields(options),
        **common.head_fields(options),
        **common.rotary_fields(options.rope),
        "intermediate_size": options.feed_forward.d_ff,
        "hidden_act": common.activation_name(options.feed_forward.activation),
        "attention_bias": options.attention_bias,
        "use_sliding_window": options.window > 0,
        "sliding_window": options.window or None,
        "layer_types": common.layer_types(options),
    }


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    decoder=_decoder,
    fields=_fields,
    block=(*table.NORMS, *table.ATTENTION, *table.HEAD_NORMS, *table.DENSE),
)
