"""configs/lm: as many parameters as transformers counts, without allocating any."""

import pathlib

import pytest

pytest.importorskip("transformers")
import torch
import transformers

from moe_jax.cli import config_file
from moe_jax.convert import to_hf
from moe_jax.models import build

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "lm"
PUBLISHED = {
    "mixtral_8x7b": "mixtral",
    "olmoe_1b_7b": "olmoe",
    "qwen3_30b_a3b": "qwen3_moe",
    "deepseek_v2_lite": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "gpt_oss_20b": "gpt_oss",
    "phi35_moe": "phimoe",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_transformers(name):
    options = config_file.load(str(FOLDER / f"{name}.py")).model
    family = to_hf.choose(options, "")
    assert family.model_type == PUBLISHED[name]
    options.mtp = 0  # transformers has no place for it in the model itself.
    fields = family.fields(options) | {"max_position_embeddings": 4096}
    config = transformers.AutoConfig.for_model(family.model_type, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(weight.numel() for weight in model.parameters())
    assert build(options).count_parameters()[0] == counted
