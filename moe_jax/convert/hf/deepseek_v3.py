"""DeepSeek-V3: sigmoid scores, groups by their best two, correction biases."""

from moe_jax.convert.hf import common, deepseek_v2
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.convert.hf.table import Weight
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.moe.selectors.top_k import TopK

# Of the correction biases, in the last part of the published training.
_BIAS_RATE = 0.001


def _selector(fields: Fields):
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    groups = fields.integer("n_group", 1)
    chosen = dict(
        top_k=fields.integer("num_experts_per_tok"),
        score="sigmoid",
        renormalize=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    top_groups = fields.integer("topk_group", 1)
    if groups == top_groups == 1:
        return TopK(**chosen)
    return GroupLimited(
        **chosen, num_groups=groups, top_groups=top_groups, group_score="top2"
    )


def _decoder(fields: Fields) -> Decoder:
    interleaved = fields.flag("rope_interleave", True)
    fields.integer("num_nextn_predict_layers", 0)  # They are taken where asked for.
    return Decoder(
        **common.shapes(fields),
        latent=deepseek_v2.latent(fields),
        feed_forward=MoE(
            **deepseek_v2.sparse(fields),
            selector=_selector(fields),
            balance=common.sequence_balance(fields, 0.0001, bias_rate=_BIAS_RATE),
        ),
        rope=common.rotary(fields, 10000.0, interleaved=interleaved),
    )


def _fields(options: Decoder) -> dict:
    selector = options.feed_forward.selector
    groups = isinstance(selector, GroupLimited)
    return {
        **common.shape_fields(options),
        **deepseek_v2.shared_fields(options),
        **common.rotary_fields(options.rope),
        "num_nextn_predict_layers": options.mtp,
        "rope_interleave": options.rope.interleaved,
        "norm_topk_prob": selector.renormalize,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": selector.num_groups if groups else 1,
        "topk_group": selector.top_groups if groups else 1,
    }


_BIAS = "mlp.gate.e_score_correction_bias"
FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    decoder=_decoder,
    fields=_fields,
    block=(*deepseek_v2.BLOCK, Weight(_BIAS, "bias", "e->e", state=True)),
    ahead=(
        Weight("enorm.weight", "embedding_norm/scale", "d->d"),
        Weight("hnorm.weight", "hidden_norm/scale", "d->d"),
        Weight("eh_proj.weight", "project", "de->ed"),
        Weight("shared_head.norm.weight", "norm/scale", "d->d"),
    ),
    float32=(_BIAS,),
)
