"""Bytes against the trainer's own shardings; FLOPs and bytes on the wire by hand."""

import math

import jax
import numpy as np
import pytest
from estimating import KINDS, MESHES, TINY, changed, estimate, local_bytes, sizes

from moe_jax import config_json
from moe_jax.cli import config_file
from moe_jax.config import MeshConfig, ModelConfig, node
from moe_jax.errors import UserError
from moe_jax.models import decoder
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.dispatch.einsum import Einsum
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.moe.dispatch.ragged import Ragged
from moe_jax.moe.dispatch.ring import Ring
from moe_jax.nn.attention.blocked import Blocked
from moe_jax.plan import analytic, facts, footprint
from moe_jax.plan.chips import BY_NAME
from moe_jax.train import setup
from moe_jax.tree import named_leaves


@pytest.fixture
def tiny():
    """4 experts, 2 of them a token, 2 layers, width 32; 8 rows of 32 tokens."""
    return config_file.load(str(TINY))


@pytest.mark.parametrize("kind", KINDS)
def test_state_bytes_are_those_of_the_trainer(tiny, kind):
    config = changed(tiny, **KINDS[kind])
    for mesh in MESHES:
        config.mesh = MeshConfig(**{"data": 1, **mesh})
        abstract = setup.make_parts(config, jax.devices()).abstract
        found = estimate(config, **mesh).memory
        params = local_bytes((abstract.params, abstract.frozen))
        # The step counter counts as optimizer state.
        others = local_bytes(
            (abstract.step, abstract.opt_state, abstract.router_state, abstract.ema)
        )
        assert found["parameters"] == params, mesh
        assert found["optimizer"] == others, mesh
        gradients = found["gradients"] or local_bytes(abstract.params)
        assert gradients == local_bytes(abstract.params), mesh


def test_gradients_of_rounded_weights_take_two_bytes(tiny):
    tiny = changed(tiny, model__dtype="bfloat16")
    tiny.model.feed_forward.dispatch = Exact(capacity_factor=1.25)
    tiny.mesh = MeshConfig(data=1)
    params = setup.make_parts(tiny, jax.devices()[:1]).abstract.params
    matrices = sum(
        leaf.size
        for name, leaf in named_leaves(params).items()
        if "/attention/w_" in name or "/experts/w_" in name
    )
    whole = local_bytes(params)
    layout, layers = facts.layout_of(tiny, sizes()), facts.of_config(tiny)
    narrow = sum(leaf.gradient_bytes(sizes()) for leaf in layers.leaves)
    assert narrow == whole - 2 * matrices
    assert footprint.at_peak(layers, layout)["gradients"] in (0, narrow)
    split = facts.layout_of(changed(tiny, train__accumulation=2), sizes())
    assert footprint.at_peak(layers, split)["gradients"] in (whole, whole + narrow)


def whole_capacity(config):
    """The config with buckets that a balanced routing fills exactly."""
    return changed(config, model__feed_forward__dispatch=Exact(capacity_factor=1.0))


@pytest.mark.parametrize("kind", ["adamw", "dense", "mixed"])
@pytest.mark.parametrize(
    "mesh",
    [dict(), dict(expert=2, tensor=2), dict(fsdp=8), dict(data=2, context=2)],
)
def test_flops_are_the_models_and_the_masked_half_of_attention(tiny, kind, mesh):
    config = changed(tiny, **KINDS[kind])
    if kind != "dense":
        config = whole_capacity(config)
    model = decoder.DecoderModel(config.model)
    length = config.data.sequence_length
    devices = math.prod(mesh.values())
    tokens = config.train.batch_size * length / devices
    found = estimate(config, **mesh)
    expected = tokens * model.flops_per_token(length)
    assert found.model_flops == pytest.approx(expected)
    width = config.model.num_layers * config.model.num_heads * 8
    masked = 6 * width * length * tokens
    # The router is no part of what tensor splits: each device does all of it.
    ways = mesh.get("tensor", 1)
    moe_layers = facts.layout_of(config, sizes(**mesh)).moe_layers
    routers = 6 * moe_layers * config.model.d_model * 4 * tokens * (ways - 1)
    assert found.executed_flops == pytest.approx(expected + masked + routers)


def test_recomputation_and_padding_are_executed(tiny):
    none = estimate(whole_capacity(tiny))
    full = estimate(changed(whole_capacity(tiny), model__remat="full"))
    dots = estimate(changed(whole_capacity(tiny), model__remat="dots"))
    tokens, model = 8 * 32, tiny.model
    logits = 6 * model.vocab_size * model.d_model * tokens
    assert full.executed_flops == pytest.approx(
        none.executed_flops + (none.executed_flops - logits) / 3
    )
    # Scores and experts (2 layers, 3 matrices, 2 rows a token) have batch dimensions.
    again = 2 * 4 * 32 * 32 * tokens + 2 * 3 * 2 * 32 * 32 * (2 * tokens)
    assert dots.executed_flops == pytest.approx(none.executed_flops + again)
    assert dots.executed_flops < full.executed_flops
    assert full.model_flops == none.model_flops
    assert "recomputation" not in none.seconds
    assert full.seconds["recomputation"] > dots.seconds["recomputation"] > 0
    # 2 layers, 3 matrices of 32 x 32, twice the rows of 2 experts a token.
    twice = changed(tiny, model__feed_forward__dispatch=Exact(capacity_factor=2.0))
    more = 6 * 2 * 3 * 32 * 32 * (2 * tokens)
    assert estimate(twice).executed_flops == pytest.approx(none.executed_flops + more)
    every = changed(tiny, model__feed_forward__dispatch=DenseDispatch())
    assert estimate(every).executed_flops == estimate(twice).executed_flops


def test_what_remat_names_is_kept_by_hand(tiny):
    def extra(remat):
        def size(remat):
            config = changed(tiny, model__remat=remat)
            lay = facts.layout_of(config, sizes(data=2, expert=2, tensor=2))
            return footprint.kept(facts.of_config(config), lay), lay

        (found, lay), (full, _) = size(remat), size("full")
        found = {name: found[name] - full[name] for name in found}
        return {name: size for name, size in found.items() if size}, lay

    # 2 layers, 64 tokens of 32 a device; 2 of 4 query heads and 1 of 2 others, of 8.
    attended = 2 * 64 * 2 * (8 * 4 + 4)
    assert extra("attention")[0] == {"activations": attended}
    assert extra("projections")[0] == {"activations": 2 * 64 * (2 + 2 * 1) * 8 * 4}
    # Gate and up, of half of the width.
    hidden, lay = extra("hidden")
    assert hidden == {"dispatch": 2 * lay.served * 2 * 16 * 4}
    # Half of each matrix of half of the experts, and of those of the heads.
    weights = 3 * 2 * 32 * 16 + 32 * (2 * 16 + 2 * 8)
    assert extra("weights")[0] == {"gathered weights": 2 * weights * 4}
    assert extra("attention+projections")[0]["activations"] > attended


def test_memory_grows_from_full_to_none(tiny):
    tiny = changed(tiny, train__batch_size=256, model__num_layers=8)
    full, exchanges, dots, none = (
        estimate(changed(tiny, model__remat=remat), expert=2).peak_bytes
        for remat in ("full", "exchanges", "dots", "none")
    )
    assert full < exchanges < none
    assert full < dots < none


def test_attention_of_windows_by_hand(tiny):
    """A causal query sees half of 2048 and half a block; in a window, that and one."""
    windows = dict(model__window=256, model__full_attention_every=2)
    long = dict(data__sequence_length=2048, model__attention=Blocked())
    flops = lambda config: analytic._attention(facts.layout_of(config, sizes())).flops
    block, model = analytic.ATTENTION_BLOCK, tiny.model
    one = 4 * 8 * 2048 * model.num_heads * model.width_per_head
    causal = 1024 + block / 2
    assert model.num_layers == 2 and 256 + block < causal
    assert flops(changed(tiny, **long)) == one * 2 * causal
    assert flops(changed(tiny, **long, **windows)) == one * (causal + 256 + block)


def test_dispatches_compute_what_they_compute():
    rows = lambda dispatch, shards=4: facts.bucket_rows(dispatch, shards, 64, 2, 8)
    assert rows(DenseDispatch()) == (512, 0)
    # 64 * 2 / 8 rows a bucket and half as many more.
    for kind in (Exact, Bucket):
        assert rows(kind(capacity_factor=1.5)) == (8 * 24, 8 * 24)
    # Two groups of 32 tokens, each with 8 buckets for 8 rows and as many more.
    assert rows(Einsum(capacity_factor=2.0, group_size=32)) == (2 * 8 * 16,) * 2
    # All 256 tokens come, with 64 * 2 choices of a shard's experts.
    for kind in (Gather, Ring):
        assert rows(kind(capacity_factor=1.5)) == (128, 256)
    # Two experts of 8 in 4 pairs: the second is elsewhere in 6 of 7 cases.
    served, sent = rows(Ragged())
    assert served == 128
    assert sent == pytest.approx(64 * (1 + 6 / 7))


def test_auto_is_what_it_becomes():
    resolve = lambda shards: facts.resolve(Auto(), shards, 4096, 8, 64)
    assert isinstance(resolve(4), Gather)
    assert isinstance(resolve(32), Ragged)


def test_a_faster_chip_is_faster(tiny):
    slow, fast = (estimate(tiny, chip=BY_NAME[n], fsdp=2) for n in ("v5e", "v6e"))
    assert fast.step_seconds < slow.step_seconds
    assert fast.wire_bytes == slow.wire_bytes
    assert fast.exposed_seconds < slow.exposed_seconds
    assert 0 < slow.exposed_seconds < slow.step_seconds


def test_facts_are_found_once_for_all_layouts(tiny):
    first = facts.of_config(tiny)
    other = changed(
        tiny,
        model__remat="full",
        train__accumulation=2,
        mesh=MeshConfig(tensor=2),
        model__feed_forward__dispatch=DenseDispatch(),
    )
    assert facts.of_config(other) is first
    assert facts.of_config(changed(tiny, model__d_model=64)) is not first
    # Nothing of the caller's config is touched.
    before = config_json.to_json(other)
    estimate(other, tensor=2)
    assert config_json.to_json(other) == before


@node
class Other(ModelConfig):
    """A family that the formulas do not know."""


def test_another_family_is_refused(tiny):
    tiny.model = Other()
    with pytest.raises(UserError, match="Other: the analytic model knows Decoder"):
        estimate(tiny)


def test_all_figures_are_finite(tiny):
    for kind in KINDS.values():
        for mesh in MESHES:
            found = estimate(changed(tiny, **kind), **mesh)
            values = [*found.memory.values(), *found.seconds.values()]
            assert np.isfinite(values).all() and min(values) >= 0
