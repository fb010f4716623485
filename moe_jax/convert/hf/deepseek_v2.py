"""DeepSeek-V2: latent attention, shared experts, groups of experts by their best."""

from moe_jax.convert.hf import common, table
from moe_jax.convert.hf.family import Family
from moe_jax.convert.hf.fields import Fields
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.attention.latent import LatentAttention

BLOCK = (
    *table.NORMS,
    *table.LATENT_ATTENTION,
    *table.DENSE,
    *table.ROUTER,
    *table.EXPERTS,
    *table.gated("mlp.shared_experts", "moe/shared"),
)


def latent(fields: Fields) -> LatentAttention:
    """The attention of versions 2 and 3."""
    fields.only("attention_bias", False)
    fields.only("rms_norm_eps", 1e-6)  # That of the latents' norms, whatever it says.
    return LatentAttention(
        query_rank=fields.integer("q_lora_rank", 0),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
    )


def sparse(fields: Fields) -> dict:
    """Arguments of `MoE` for experts, shared experts, and dense layers below."""
    fields.only("moe_layer_freq", 1)
    width = fields.integer("moe_intermediate_size")
    first_dense = fields.integer("first_k_dense_replace", 0)
    d_ff = fields.integer("intermediate_size", 0)
    return dict(
        num_experts=fields.integer("n_routed_experts"),
        experts=ExpertFeedForward(d_ff=width, activation=common.activation(fields)),
        shared_d_ff=width * fields.integer("n_shared_experts", 0),
        first_dense=first_dense,
        dense_d_ff=d_ff if first_dense else 0,
    )


def shared_fields(options: Decoder) -> dict:
    """The reverse of `latent` and `sparse`."""
    moe, attention = options.feed_forward, options.latent
    width = moe.experts.d_ff
    return {
        "attention_bias": False,
        "num_key_value_heads": options.num_heads,
        "head_dim": attention.rope_dim,
        "q_lora_rank": attention.query_rank or None,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.value_dim,
        "moe_layer_freq": 1,
        "moe_intermediate_size": width,
        "first_k_dense_replace": moe.first_dense,
        **({"intermediate_size": moe.dense_d_ff} if moe.dense_d_ff else {}),
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_d_ff // width,
        "hidden_act": common.activation_name(moe.experts.activation),
        "num_experts_per_tok": moe.selector.top_k,
        "routed_scaling_factor": moe.selector.scale,
    }


def _selector(fields: Fields):
    fields.only("scoring_func", "softmax")
    # The reference leaves it out, the model's first code does not.
    fields.only("norm_topk_prob", False)
    method = fields.only("topk_method", "greedy", "group_limited_greedy")
    chosen = dict(
        top_k=fields.integer("num_experts_per_tok"),
        score="softmax",
        renormalize=False,
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    if method == "greedy":
        for name in ("n_group", "topk_group"):
            fields.get(name, None)  # It does not count.
        return TopK(**chosen)
    return GroupLimited(
        **chosen,
        num_groups=fields.integer("n_group"),
        top_groups=fields.integer("topk_group"),
        group_score="max",
    )


def _decoder(fields: Fields) -> Decoder:
    fields.only("mlp_bias", False)
    return Decoder(
        **common.shapes(fields),
        latent=latent(fields),
        feed_forward=MoE(
            **sparse(fields),
            selector=_selector(fields),
            balance=common.sequence_balance(fields, 0.001),
        ),
        rope=common.rotary(fields, 10000.0, interleaved=True),
    )


def _fields(options: Decoder) -> dict:
    selector = options.feed_forward.selector
    groups = isinstance(selector, GroupLimited)
    return {
        **common.shape_fields(options),
        **shared_fields(options),
        **common.rotary_fields(options.rope),
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if groups else "greedy",
        "n_group": selector.num_groups if groups else None,
        "topk_group": selector.top_groups if groups else None,
    }


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    decoder=_decoder,
    fields=_fields,
    block=BLOCK,
)
