"""The diffusion transformer's config: published sizes, segments, rules."""

import jax
import numpy as np
import pytest
from test_dit import MIXED, SINGLE, K, experts, options

from moe_jax import config
from moe_jax.data.images.config import ImageDataConfig
from moe_jax.diffusion.evaluation import ImageEvalConfig
from moe_jax.errors import UserError
from moe_jax.models import build
from moe_jax.models.dit import DiTModel
from moe_jax.models.dit_config import SIZES, DiT, segments_of
from moe_jax.models.segments import Kind, Segment
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.hashing import Hash
from moe_jax.nn.attention.cudnn import CuDNN
from moe_jax.nn.attention.splash import Splash
from moe_jax.objectives.next_token import NextToken
from moe_jax.tree import named_leaves

# Sizes; experts; all parameters, and those of a token, in the published digits; and
# multiplications of a forward pass, in 10^9.
PUBLISHED = [
    ("S", 8, "199M", "71M", 15.4),
    ("S", 16, "369M", "71M", 15.4),
    ("B", 8, "795M", "286M", 61.7),
    ("L", 8, "2.8B", "1.0B", 219),
    ("XL", 8, "4.1B", "1.4B", 324),
    ("G", 16, "16.5B", "3.1B", 691),
]


def cut_to(number, like):
    """A count in the digits of another, cut: "4.1B"."""
    unit = {"M": 1e6, "B": 1e9}[like[-1]]
    digits = len(like.split(".")[1]) - 1 if "." in like else 0
    return f"{np.floor(number / unit * 10**digits) / 10**digits:.{digits}f}{like[-1]}"


@pytest.mark.parametrize("size, count, total, active, giga", PUBLISHED)
def test_the_published_sizes(size, count, total, active, giga):
    """Nothing is allocated; the published counts have the fixed positions too."""
    numbers = SIZES[size]
    layers, d = numbers["num_layers"], numbers["d_model"]
    heads = dict(qk_norm="layer" if size in ("XL", "G") else "none")
    model = DiTModel(DiT(**numbers, **heads, feed_forward=experts(d, count)))
    found, served = (n + 256 * d for n in model.count_parameters())
    assert (cut_to(found, total), cut_to(served, active)) == (total, active)
    per_layer = lambda e: (12 * e + 16) * d * d + count * d + 10 * d
    outside = 16 * d + d + 256 * d + d + d * d + d + 1001 * d + 256 * d
    outside += 2 * d * d + 2 * d + d * 32 + 32
    more = layers * 4 * d // numbers["num_heads"] if heads["qk_norm"] == "layer" else 0
    assert found == layers * per_layer(count) + outside + more
    assert served == layers * per_layer(K) + outside + more
    # Published: multiplications of tokens with weights, of one forward pass.
    tokens = layers * (12 * K + 10) * d * d * 256
    np.testing.assert_allclose(tokens / 1e9, giga, rtol=5e-3)
    ends = 256 * d * (16 + 32 + count * layers)
    once = (layers * 6 + 3) * d * d + 256 * d
    attention = layers * 2 * 256 * 256 * d
    assert model.flops_per_row(0) == 6 * (tokens + ends + once + attention)


@pytest.mark.parametrize(
    "fields, want",
    [
        (dict(**SIZES["S"], feed_forward=experts(384, 8)), 199_307_552),
        (dict(**SIZES["S"]), 32_963_360),
    ],
)
def test_counts_known_to_the_last_digit(fields, want):
    total, _ = DiTModel(DiT(**fields)).count_parameters()
    assert total + 256 * 384 == want


def test_segments():
    made = options(num_layers=5, feed_forward=MIXED["feed_forward"])
    dense, moe = Kind(False), Kind(True)
    assert segments_of(made) == (
        Segment((dense,), 1, 0, 0),
        Segment((dense, moe), 2, 1, 0),
    )
    assert segments_of(options()) == (Segment((dense,), 3, 0, 0),)


def test_axes_mirror_the_parameters():
    ff = experts(every=3, dense_d_ff=64)
    model = DiTModel(options(qk_norm="layer", feed_forward=ff, **SINGLE))
    shapes = named_leaves(jax.eval_shape(model.init, jax.random.key(0)))
    axes = named_leaves(model.axes, is_leaf=lambda v: isinstance(v, tuple))
    assert axes.keys() == shapes.keys()
    assert named_leaves(model.rounded).keys() == named_leaves(model.whole).keys()
    assert axes.keys() == named_leaves(model.whole).keys()
    for name, leaf in shapes.items():
        assert len(axes[name]) == leaf.ndim, name


def test_it_is_built_by_its_config_and_says_what_it_took():
    model = build(options(**SINGLE | dict(dtype="bfloat16"), image_size=64))
    assert isinstance(model, DiTModel)
    assert model.notes(2, 64) == [
        "auto attention: Blocked for rows of 1024 tokens over 1 shards, bfloat16 heads "
        "of 8, without causality, on cpu"
    ]


@pytest.mark.parametrize(
    ("fields", "mesh", "words"),
    [
        ({}, {}, ""),
        (MIXED, {}, ""),
        (dict(patch_size=3), {}, "image_size=8 is not divisible by config.model.patch"),
        (dict(d_model=30, num_heads=5), {}, "d_model=30: must be a multiple of 4"),
        (dict(num_heads=5), {}, "num_heads=5; num_heads takes one of [1, 2, 4, 8, 16"),
        (dict(num_layers=0), {}, "num_layers=0: must be at least 1"),
        (dict(num_layers=2**32), {}, "num_layers=4294967296: must be at most 10,000"),
        (dict(num_classes=-1), {}, "num_classes=-1: must be at least 0"),
        (dict(condition_width=4), {}, "a class or a vector; set one of them to 0"),
        (dict(condition_dropout=1.0), {}, "condition_dropout=1.0: must lie in [0, 1)"),
        (dict(num_classes=0), {}, "condition_dropout=0.1 would be ignored"),
        (dict(qk_norm="projection"), {}, "must be one of ['none', 'layer', 'head']"),
        (dict(remat="some"), {}, "'some' is not known"),
        (dict(remat="exchanges"), {}, "so nothing is exchanged"),
        (dict(remat="full,none"), {}, "the run of 3 blocks from block 0 on"),
        (dict(dtype="float8"), {}, "dtype='float8'"),
        (dict(num_layers=2, **MIXED), {}, "leaves no block for experts"),
        (
            dict(remat="full,none", feed_forward=MoE(every=2**40, dense_d_ff=8)),
            {},
            "every=1099511627776 leaves no block for experts",
        ),
        (
            dict(feed_forward=MoE(selector=Hash())),
            {},
            "patches have none; choose another selector",
        ),
        (
            dict(feed_forward=MoE(allow_noncausal=True)),
            {},
            "allow_noncausal=True would be ignored: a DiT has no causality",
        ),
        (dict(attention=CuDNN(), d_model=36), {}, "CuDNN: head_dim=9 is not a"),
        (dict(attention=Splash()), {}, "Splash takes multiples of 128 patches"),
        ({}, dict(context=3), "16 patches, which config.mesh.context=3 does not"),
        ({}, dict(fsdp=3), "d_model=32 is not divisible by config.mesh.fsdp"),
        ({}, dict(tensor=3), "num_heads=4 is not divisible by config.mesh.tensor"),
    ],
)
def test_problems(fields, mesh, words):
    root = config.Config(mesh=config.MeshConfig(**mesh))
    found = list(options(**fields).problems("config.model", root))
    if words:
        assert any(words in one for one in found), found
    else:
        assert found == []


def test_patches_of_no_size():
    """The rules of the tree ask for the number of patches, too."""
    images, wrong = dict(data=ImageDataConfig(), eval=ImageEvalConfig()), options()
    wrong.patch_size = 0
    root = config.Config(model=wrong, **images)
    with pytest.raises(UserError, match="patch_size=0: must be at least 1"):
        config.validate(root)


def test_it_does_not_predict_text():
    root = config.Config(objective=NextToken())
    (found,) = options().problems("config.model", root)
    assert "objective=NextToken predicts the next token; choose" in found


def test_a_shrunk_model_is_of_the_same_kind():
    ff = experts(1152, 8, first_dense=2, every=2, dense_d_ff=4608)
    big = DiT(**SIZES["XL"], feed_forward=ff, attention=Splash())
    small = big.shrunk()
    assert list(small.problems("config.model", config.Config())) == []
    assert small.num_layers == 5 and small.feed_forward.selector == ff.selector
    assert segments_of(small)[1].blocks == (Kind(False), Kind(True))
    assert big.num_layers == 28 and ff.experts.d_ff == 4608
