"""Families of Hugging Face models, one a file, by the name in their config.json."""

from moe_jax.convert.hf import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    llama,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from moe_jax.convert.hf.family import Family

_MODULES = (
    llama,
    qwen3,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    phimoe,
)
FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in _MODULES
}
