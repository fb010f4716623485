"""configs/dit: published sizes, counted without allocating; all are valid."""

import pathlib

import pytest

from moe_jax import config
from moe_jax.cli import config_file
from moe_jax.errors import UserError
from moe_jax.models import build
from moe_jax.models.dit_config import SIZES
from moe_jax.moe.layer import MoE

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "dit"
NAMES = [path.stem for path in sorted(FOLDER.glob("*.py"))]
# Size and experts, all parameters and those of a token as they were published, with
# the fixed positions, which are no parameters here.
PUBLISHED = {
    "dit_moe_s2": ("S", 8, 199e6, 71e6),
    "dit_moe_b2": ("B", 8, 795e6, 286e6),
    "dit_moe_xl2": ("XL", 8, 4.1e9, 1.5e9),
    "dit_moe_g2": ("G", 16, 16.5e9, 3.1e9),
    "promoe_s2": ("S", 12, 75e6, 33e6),
    "promoe_b2": ("B", 12, 300e6, 130e6),
    "promoe_l2": ("L", 12, 1.063e9, 458e6),
    "promoe_xl2": ("XL", 12, 1.568e9, 675e6),
}
SWITCH = {"switch_dit_s2": "S", "switch_dit_b2": "B", "switch_dit_l2": "L"}
SWITCH |= {"switch_dit_xl2": "XL"}
OTHERS = {"digits", "mnist", "cifar10", "diffmoe_l2_imagenet256"}


def load(name):
    return config_file.load(str(FOLDER / f"{name}.py"))


def sized(name):
    return load(f"{name}_imagenet256").model


def test_every_file_is_here():
    full = {f"{name}_imagenet256" for name in [*PUBLISHED, *SWITCH]}
    assert set(NAMES) == full | OTHERS


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mnist"])  # Needs files.
def test_the_config_is_valid_and_says_its_size(name):
    made = load(name)
    config.validate(made)
    if not name.endswith("imagenet256"):
        return
    text = (FOLDER / f"{name}.py").read_text()
    for count in build(made.model).count_parameters():
        shown = f"{count / 1e6:.1f} million"
        shown = f"{count / 1e9:.2f} billion" if count >= 1e9 else shown
        assert shown in text, shown


@pytest.mark.parametrize(
    "variant", ["dense", "dit_moe", "promoe", "expert_choice", "dtr"]
)
def test_variants_of_mnist_have_equal_active_feed_forwards(variant):
    made = config_file.load(f"{FOLDER / 'mnist.py'}:{variant}")
    made.data.source.images, made.data.source.labels = "images.gz", "labels.gz"
    config.validate(made)
    d, feed_forward = made.model.d_model, made.model.feed_forward
    if variant in ("dense", "dtr"):
        assert feed_forward.d_ff == 4 * d
        return
    chosen = getattr(feed_forward.selector, "top_k", 0)
    if variant == "expert_choice":  # On average of the tokens.
        chosen = feed_forward.selector.capacity_factor
    assert chosen * feed_forward.experts.d_ff + feed_forward.shared_d_ff == 4 * d


def outside(size, out):
    """What stands outside the blocks of a dense or sparse DiT; `out` channels."""
    d = SIZES[size]["d_model"]
    embedded = 16 * d + d + 256 * d + d + d * d + d + 1001 * d
    return embedded + 2 * d * d + 2 * d + 4 * out * d + 4 * out


def attended(d):
    """Attention and modulation of a block."""
    return 4 * d * d + 4 * d + 6 * d * d + 6 * d


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    size, experts, *want = PUBLISHED[name]
    made = sized(name)
    layers, d = SIZES[size]["num_layers"], SIZES[size]["d_model"]
    counts = build(made).count_parameters()
    for count, published in zip(counts, want, strict=True):
        # Some were rounded, some cut.
        digit = 1e6 if published < 1e9 else 1e8 if name.startswith("dit") else 1e6
        assert abs(count + 256 * d - published) <= digit, name
    if name.startswith("dit_moe"):
        norms = 4 * d // SIZES[size]["num_heads"] * (made.qk_norm == "layer")
        of_block = lambda e: attended(d) + norms + experts * d + (12 * e + 6) * d * d
        exact = [layers * of_block(e) + outside(size, 8) for e in (experts, 2)]
    else:
        unit = 2 * d * 2 * d + 2 * d + d  # Of 2 D; dense blocks have 4 D.
        dense = 2 * d * 4 * d + 4 * d + d
        sparse = lambda e: (e + 1) * unit + experts * d
        # The routed one and the shared; the one without class serves in its place.
        exact = [
            layers * attended(d) + layers // 2 * (dense + sparse(e)) + outside(size, 4)
            for e in (experts + 1, 1)
        ]
    assert list(counts) == exact


def test_known_to_the_last_digit():
    assert build(sized("dit_moe_s2")).count_parameters()[0] + 256 * 384 == 199_307_552


@pytest.mark.parametrize("name", SWITCH)
def test_switch_dit_has_three_linear_experts_a_block(name):
    size = SWITCH[name]
    layers, d = SIZES[size]["num_layers"], SIZES[size]["d_model"]
    dense = attended(d) + 8 * d * d + 5 * d
    mask = lambda e: e * (d * d + d) + 3 * d + 3
    counts = build(sized(name)).count_parameters()
    exact = [layers * (dense + mask(e)) + outside(size, 8) for e in (3, 2)]
    assert list(counts) == exact


def test_diffmoe_activates_what_a_dense_model_has():
    made = sized("diffmoe_l2")
    assert isinstance(made.feed_forward, MoE) and made.feed_forward.num_experts == 16
    d, layers = 1024, 24
    unit = 8 * d * d + 5 * d
    router = 16 * d + d * d + d + 16 * d + 16  # With the predictor of capacities.
    of = lambda e: layers * attended(d) + layers // 2 * (unit + e * unit + router)
    counts = build(made).count_parameters()
    assert list(counts) == [of(e) + outside("L", 4) for e in (16, 1)]


def test_latents_are_no_pictures():
    made = load("dit_moe_s2_imagenet256")
    made.eval.samples = 4
    with pytest.raises(UserError, match="samples=4: a picture shows 1 or 3 channels"):
        config.validate(made)


ROUTERS = FOLDER.parent / "bench" / "image_routers.py"
ROUTER_NAMES = ("dit_moe", "timestep", "mode", "promoe", "promoe_choice", "ec_dit")
ROUTER_NAMES += ("diffmoe", "expert_race", "switch_dit", "dtr")


@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_every_router_of_images_is_valid(name):
    config.validate(config_file.load(f"{ROUTERS}:{name}"))
