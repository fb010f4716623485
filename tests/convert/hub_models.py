"""Tiny models of Hugging Face transformers, one a family, with everything random.

Each has what its family may have: biases, windows, sinks, scalings of rotary positions
that matter within 64 tokens. Weights are large, and norms, biases, sinks and correction
biases are not at their neutral values, so that a mistake in any of them shows.
"""

import torch
import transformers

_SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=32,
)
_LATENT = dict(
    num_key_value_heads=4,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=10,
)
# By model type: the arguments of its config.
CONFIGS = {
    "llama": dict(
        intermediate_size=48,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=10000.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "qwen3": dict(
        num_hidden_layers=3,
        head_dim=16,
        intermediate_size=48,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0),
    ),
    "mixtral": dict(intermediate_size=24, num_local_experts=4, sliding_window=24),
    "olmoe": dict(
        intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=3,
        attention_bias=True,
        clip_qkv=0.9,
    ),
    "qwen2_moe": dict(
        num_hidden_layers=3,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": dict(
        num_hidden_layers=4,
        head_dim=16,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        rope_parameters=_YARN,
    ),
    "deepseek_v2": dict(
        _LATENT,
        q_lora_rank=None,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=3.0,
        rope_parameters=_YARN | dict(mscale=0.7, mscale_all_dim=0.7),
    ),
    "deepseek_v3": dict(
        _LATENT,
        num_hidden_layers=3,
        q_lora_rank=24,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        rope_parameters=_YARN | dict(mscale=1.0, mscale_all_dim=1.0),
    ),
    "gpt_oss": dict(
        num_hidden_layers=4,
        head_dim=8,
        intermediate_size=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=12,
        swiglu_limit=0.8,
        rope_parameters=_YARN | dict(truncate=False, beta_fast=32.0, beta_slow=1.0),
    ),
    "phimoe": dict(
        intermediate_size=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_jitter_noise=0.2,
        attention_bias=True,
        lm_head_bias=True,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=10000.0,
            short_factor=[1.0, 1.5, 2.0, 3.0],
            long_factor=[2.0, 3.0, 4.0, 6.0],
            short_mscale=1.2,
            long_mscale=1.3,
            original_max_position_embeddings=128,
        ),
    ),
}


def make(model_type, seed=0, **changes):
    """A model in evaluation mode, float32."""
    torch.manual_seed(seed)
    arguments = {**_SIZES, **CONFIGS[model_type], **changes}
    config = transformers.AutoConfig.for_model(model_type, **arguments)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(0.5 + torch.rand_like(tensor))
            elif "inv_freq" in name:
                continue
            elif tensor.ndim == 1 or name.endswith("proj_bias"):
                tensor.copy_(0.3 * torch.randn_like(tensor))
    return model.eval()
