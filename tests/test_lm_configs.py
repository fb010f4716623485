"""configs/lm: the published sizes, counted without allocating, and small ones alike."""

import copy
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from moe_jax import config
from moe_jax.cli import config_file
from moe_jax.models import build
from moe_jax.moe.routing import TRAIN
from moe_jax.objectives import OBJECTIVES

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "lm"
# As they were published, and as transformers counts them
# (tests/convert/test_published_sizes.py). Files of DeepSeek-V3 hold 14,848 numbers
# more: the bias of 256 experts in 58 layers, which is router state here.
PUBLISHED = {
    "mixtral_8x7b": 46_702_792_704,
    "olmoe_1b_7b": 6_919_161_856,
    "qwen3_30b_a3b": 30_532_122_624,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_419_200 - 14_848,
    "gpt_oss_20b": 20_914_757_184,
    "phi35_moe": 41_873_153_344,
}
TINY = {
    "tiny_mixtral": "mixtral_8x7b",
    "tiny_olmoe": "olmoe_1b_7b",
    "tiny_qwen3_moe": "qwen3_30b_a3b",
    "tiny_deepseek_v2": "deepseek_v2_lite",
    "tiny_deepseek_v3": "deepseek_v3",
    "tiny_gpt_oss": "gpt_oss_20b",
    "tiny_phimoe": "phi35_moe",
}


def load(name):
    return config_file.load(str(FOLDER / f"{name}.py"))


def test_every_file_is_here():
    assert {p.stem for p in FOLDER.glob("*.py")} == {*PUBLISHED, *TINY}


@pytest.mark.parametrize("name", [*PUBLISHED, *TINY])
def test_the_config_is_valid_and_says_its_size(name):
    made = load(name)
    config.validate(made)
    counts = build(made.model).count_parameters()
    if made.model.mtp and name in PUBLISHED:
        counts = (PUBLISHED[name], counts[1])
    unit, digits = (1e9, 1) if name in PUBLISHED else (1e3, 0)
    words = {1e9: "billion", 1e3: "thousand"}[unit]
    text = (FOLDER / f"{name}.py").read_text()
    for count in counts:
        shown = f"{count / unit:.{digits}f}".removesuffix(".0")
        assert f"{shown} {words}" in text, shown


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    options = load(name).model
    options.mtp = 0  # Published counts leave it out.
    assert build(options).count_parameters()[0] == PUBLISHED[name]


# What only has another size.
SIZES = ("nope_dim", "rope_dim", "value_dim", "kv_rank", "original_length")
SIZES += ("num_groups", "top_groups")


def choices(node, default):
    """Fields of a config that are not as they begin, with those of sub-configs."""
    found = set()
    for field in dataclasses.fields(node):
        value, first = getattr(node, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            first = first if type(first) is type(value) else type(value)()
            below = choices(value, first)
            found |= {f"{field.name}={type(value).__name__}"}
            found |= {f"{field.name}.{one}" for one in below}
        elif value != first and field.name not in SIZES:
            found.add(field.name)
    return found


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_is_of_the_same_kind(name):
    big, small = (load(n).model for n in (TINY[name], name))
    for options in (big, small):
        ff = options.feed_forward
        ff.dispatch, ff.noise = copy.deepcopy(small.feed_forward.dispatch), None
        ff.num_experts = ff.experts.d_ff = ff.selector.top_k = 1
        options.vocab_size = options.num_layers = options.d_model = 1
        options.num_heads = options.head_dim = 1
        options.dtype, options.remat, options.init_std = "float32", "none", 1.0
    default = type(big)()
    assert choices(small, default) == choices(big, default)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_has_a_loss(name):
    made = load(name)
    model = build(made.model)
    rows = {
        n: jnp.ones((2, 8), jnp.float32 if n == "weights" else jnp.int32)
        for n in ("tokens", "targets", "positions", "segments", "weights")
    }

    def loss(key):
        run = OBJECTIVES[type(made.objective)]
        given = model.init(key), model.init_router_state(), rows
        return run(made.objective, model, *given, key=key, mode=TRAIN)

    found = jax.eval_shape(loss, jax.random.key(0))
    assert found.sum.shape == () and found.sum.dtype == jnp.float32
