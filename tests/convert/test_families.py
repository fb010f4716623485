"""config.json and the decoder's config, both ways, without weights."""

import pathlib

import pytest

from moe_jax.cli import config_file
from moe_jax.convert import to_hf
from moe_jax.convert.hf import FAMILIES
from moe_jax.convert.hf.fields import Fields
from moe_jax.errors import UserError
from moe_jax.models.decoder import Decoder
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn import rope

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "lm"
# What the published files have, in small; the names are theirs.
_COMMON = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
}
SMALLEST = {
    "llama": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 20},
    "qwen3_moe": _MOE,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
}


def fields_of(family, **changes):
    return Fields({**_COMMON, **SMALLEST[family], **changes}, "config.json")


def decoder(family, **changes):
    return FAMILIES[family].decoder(fields_of(family, **changes))


def refusal(family, **changes):
    with pytest.raises(UserError) as error:
        decoder(family, **changes)
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_comes_back_from_its_decoder(family):
    model = decoder(family)
    assert to_hf.lost(FAMILIES[family], model) == []


@pytest.mark.parametrize(
    "family, changes, expected",
    [
        ("llama", dict(head_dim=None), dict(head_dim=8, num_kv_heads=2)),
        ("llama", dict(attention_bias=True), dict(attention_output_bias=True)),
        ("mixtral", dict(sliding_window=7), dict(window=7)),
        ("olmoe", dict(clip_qkv=8.0), dict(clip_qkv=8.0, qk_norm="projection")),
        ("qwen2_moe", {}, dict(attention_bias=True, attention_output_bias=False)),
        ("qwen3", dict(sliding_window=9), dict(window=0, qk_norm="head")),
        (
            "qwen3",
            dict(use_sliding_window=True, sliding_window=9, max_window_layers=0),
            dict(window=9, full_attention_every=0),
        ),
        ("qwen3_moe", dict(use_sliding_window=True, sliding_window=9), dict(window=9)),
        ("gpt_oss", dict(sliding_window=9), dict(window=9, full_attention_every=2)),
        ("phimoe", dict(sliding_window=512), dict(window=0, norm="layer")),
        ("phimoe", dict(sliding_window=511), dict(window=511)),
        ("phimoe", dict(lm_head_bias=True), dict(output_bias=True)),
    ],
)
def test_fields_of_the_decoder(family, changes, expected):
    model = decoder(family, **changes)
    assert {name: getattr(model, name) for name in expected} == expected
    assert to_hf.lost(FAMILIES[family], model) == []


def test_selectors():
    v2 = decoder("deepseek_v2", routed_scaling_factor=16.0).feed_forward
    assert v2.selector == TopK(top_k=2, score="softmax", renormalize=False, scale=16.0)
    assert (v2.shared_d_ff, v2.first_dense, v2.dense_d_ff) == (32, 1, 48)
    groups = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)
    assert decoder("deepseek_v2", **groups).feed_forward.selector == GroupLimited(
        top_k=2, num_groups=4, top_groups=2, score="softmax", group_score="max",
        renormalize=False,
    )  # fmt: skip
    v3 = decoder("deepseek_v3", routed_scaling_factor=2.5).feed_forward
    assert v3.selector == GroupLimited(
        top_k=2, num_groups=4, top_groups=2, score="sigmoid", group_score="top2",
        renormalize=True, scale=2.5,
    )  # fmt: skip
    assert v3.balance.bias_rate > 0
    assert decoder("mixtral").feed_forward.selector == TopK(top_k=2)
    assert decoder("qwen3_moe").feed_forward.selector.renormalize is False
    assert decoder("gpt_oss").feed_forward.selector.softmax == "after"


def test_balance_losses():
    pooled = decoder("mixtral", router_aux_loss_coef=0.02).feed_forward.balance
    assert (pooled.pooled_weight, pooled.load_share) == (0.02, "tokens")
    assert pooled.load_balance_weight == pooled.z_weight == 0
    none = decoder("mixtral", router_aux_loss_coef=0.0).feed_forward.balance
    assert not none.has_load_balance and none.load_share == "assignments"
    rows = decoder("deepseek_v2", aux_loss_alpha=0.3).feed_forward.balance
    assert (rows.sequence_weight, rows.load_balance_weight) == (0.3, 0)
    whole = decoder("deepseek_v2", aux_loss_alpha=0.3, seq_aux=False)
    assert whole.feed_forward.balance.load_balance_weight == 0.3


@pytest.mark.parametrize(
    "changes, first_dense, every, dense",
    [
        ({}, 0, 1, []),
        (dict(mlp_only_layers=[0, 1]), 2, 1, [0, 1]),
        (dict(decoder_sparse_step=2), 0, 2, [0, 2]),
        (dict(decoder_sparse_step=2, mlp_only_layers=[1]), 2, 2, [0, 1, 2]),
        (dict(mlp_only_layers=[0, 2]), 0, 2, [0, 2]),
        (dict(mlp_only_layers=[0, 1, 3], num_hidden_layers=5), 1, 2, [0, 1, 3]),
    ],
)
def test_which_layers_have_experts(changes, first_dense, every, dense):
    model = decoder("qwen3_moe", **changes)
    ff = model.feed_forward
    back = FAMILIES["qwen3_moe"].fields(model)
    step, only = back["decoder_sparse_step"], back["mlp_only_layers"]
    layers = range(model.num_layers)
    assert dense == [i for i in layers if (i + 1) % step or i in only]
    assert to_hf.lost(FAMILIES["qwen3_moe"], model) == []
    if dense != [0, 1, 2]:  # Where the same layers can be said in two ways.
        assert (ff.first_dense, ff.every) == (first_dense, every)


@pytest.mark.parametrize(
    "said, expected",
    [
        (dict(rope_theta=5e5), rope.Rope(theta=5e5)),
        (dict(rope_parameters=dict(rope_theta=7.0)), rope.Rope(theta=7.0)),
        (
            dict(rope_scaling=dict(type="linear", factor=2)),
            rope.Rope(scaling=rope.Linear(factor=2.0)),
        ),
        (
            dict(rope_theta=5e5, rope_scaling=dict(
                rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_position_embeddings=8192)),
            rope.Rope(theta=5e5, scaling=rope.Llama3()),
        ),
        (
            dict(rope_scaling=dict(type="yarn", factor=40, mscale=1.0,
                mscale_all_dim=1.0, original_max_position_embeddings=4096)),
            rope.Rope(scaling=rope.YaRN(factor=40.0, mscale=1.0, mscale_all_dim=1.0)),
        ),
        (
            dict(rope_scaling=dict(type="yarn", original_max_position_embeddings=64)),
            rope.Rope(scaling=rope.YaRN(factor=8.0, original_length=64)),
        ),
    ],
)  # fmt: skip
def test_rotary_positions(said, expected):
    model = decoder("llama", **said)
    assert model.rope == expected
    back = FAMILIES["llama"].fields(model)
    assert FAMILIES["llama"].decoder(fields_of("llama", **back)).rope == expected
    older = {k: v for k, v in back.items() if k != "rope_parameters"}
    assert FAMILIES["llama"].decoder(fields_of("llama", **older)).rope == expected


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu': not supported; 'silu'"),
        ("llama", dict(hidden_size="32"), "hidden_size='32' is no int"),
        ("llama", dict(num_hidden_layers=None), "num_hidden_layers is missing"),
        ("gpt_oss", dict(num_hidden_layers=2**32), "=4294967296: must be at most 10,0"),
        ("llama", dict(attention_bias=1), "attention_bias=1 is no bool"),
        (
            "llama",
            dict(rope_scaling=dict(type="dynamic", factor=2.0)),
            "rope_scaling={'type': 'dynamic', 'factor': 2.0}: the kind 'dynamic' is n",
        ),
        (
            "llama",
            dict(rope_scaling=dict(type="linear", factor=2.0, offset=3)),
            "offset=3 is not used here",
        ),
        (
            "qwen3_moe",
            dict(mlp_only_layers=[2]),
            "mlp_only_layers=[2]: with decoder_sparse_step=1 the layers with experts "
            "are [0, 1, 3]; only the first k layers may be dense",
        ),
        (
            "gpt_oss",
            dict(layer_types=["full_attention"] + ["sliding_attention"] * 3,
                 sliding_window=9),
            "only a pattern in which each n-th layer",
        ),
        ("gpt_oss", dict(layer_types=["chunked"] * 4), "a kind that is not supported"),
        ("gpt_oss", dict(swiglu_alpha=1.5), "swiglu_alpha=1.5: not supported; 1.702"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5: not"),
        ("phimoe", dict(num_experts_per_tok=3), "num_experts_per_tok=3: not supported"),
        ("deepseek_v2", dict(norm_topk_prob=True), "norm_topk_prob=True: not supp"),
        ("deepseek_v2", dict(topk_method="noaux_tc"), "topk_method='noaux_tc': not"),
        ("deepseek_v2", dict(rms_norm_eps=1e-5), "rms_norm_eps=1e-05: not supported"),
        ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func='softmax': not"),
        ("deepseek_v3", dict(moe_layer_freq=2), "moe_layer_freq=2: not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_by_name(family, changes, message):
    said = refusal(family, **changes)
    assert message in said and said.startswith("config.json: ")


def test_a_field_that_nothing_reads_is_told():
    fields = fields_of("llama", attention_chunk_size=64, attention_dropout=0.0)
    FAMILIES["llama"].decoder(fields)
    assert fields.notes() == ["config.json: attention_chunk_size=64 is not used"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_the_configs_of_published_models_can_be_exported(path):
    names = {"gpt_oss_20b": "gpt_oss", "phi35_moe": "phimoe", "olmoe_1b_7b": "olmoe",
             "qwen3_30b_a3b": "qwen3_moe", "mixtral_8x7b": "mixtral",
             "deepseek_v2_lite": "deepseek_v2"}  # fmt: skip
    stem = path.stem.removeprefix("tiny_")
    model = config_file.load(str(path)).model
    assert to_hf.choose(model, "").model_type == names.get(stem, stem)


def test_a_model_that_no_family_expresses_is_refused_with_the_reason():
    model = decoder("mixtral")
    model.logit_softcap = 30.0
    with pytest.raises(UserError) as error:
        to_hf.choose(model, "")
    assert "not even mixtral can express" in str(error.value)
    assert "config.model.logit_softcap: 30.0 -> 0.0" in str(error.value)
    model.logit_softcap, model.sinks = 0.0, True
    with pytest.raises(UserError, match=r"one that mixtral can [^$]*sinks: True -> F"):
        to_hf.choose(model, "mixtral")
    with pytest.raises(UserError, match="of another kind"):
        to_hf.choose(decoder("llama"), "deepseek_v3")
    with pytest.raises(UserError, match="--family=gpt: must be one of llama, qwen3"):
        to_hf.choose(model, "gpt")


def test_how_a_model_runs_does_not_stand_in_the_way():
    model = decoder("deepseek_v3")
    model.dtype, model.remat, model.init_std = "bfloat16", "none", 0.5
    model.feed_forward.balance.bias_rate = 0.5
    model.feed_forward.expert_axes = ("expert", "tensor")
    assert to_hf.lost(FAMILIES["deepseek_v3"], model) == []
    model.feed_forward.balance.bias_rate = 0.0  # Its files hold the biases.
    assert to_hf.lost(FAMILIES["deepseek_v3"], model) != []


def test_a_dense_model_is_no_mixtral():
    dense = Decoder(feed_forward=MoE().dense(32))
    assert to_hf.choose(dense, "").model_type == "llama"
