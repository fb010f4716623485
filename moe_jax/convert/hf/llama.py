"""Llama 2 and 3: dense, grouped queries, rotary scaling."""

from moe_jax.convert.hf import common, table
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.models.decoder_config import Decoder
from moe_jax.nn.feedforward import Dense


def _decoder(fields: Fields) -> Decoder:
    bias = fields.flag("attention_bias", False)
    return Decoder(
        **common.shapes(fields),
        **common.heads(fields),
        feed_forward=Dense(
            d_ff=fields.integer("intermediate_size"),
            activation=common.activation(fields),
            bias=fields.flag("mlp_bias", False),
        ),
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
        "mlp_bias": options.feed_forward.bias,
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    decoder=_decoder,
    fields=_fields,
    block=(*table.NORMS, *table.ATTENTION, *table.DENSE),
)
