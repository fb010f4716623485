"""Bytes against the trainer's own shardings; FLOPs and bytes on the wire by hand."""

import copy
import math
import pathlib

import jax
import numpy as np
import pytest

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
from moe_jax.nn.attention.latent import LatentAttention
from moe_jax.nn.feedforward import Dense
from moe_jax.parallel.mesh import AXES
from moe_jax.plan import analytic, exchanges, facts, footprint
from moe_jax.plan.chips import BY_NAME
from moe_jax.train import setup
from moe_jax.train.optimizers import Adafactor, ParamGroup
from moe_jax.tree import named_leaves

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"
CHIP = BY_NAME["v5e"]


@pytest.fixture
def tiny():
    """4 experts, 2 of them a token, 2 layers, width 32; 8 rows of 32 tokens."""
    return config_file.load(str(TINY))


def sizes(**mesh):
    return {axis: mesh.get(axis, 1) for axis in AXES}


def estimate(config, slices=1, chip=CHIP, **mesh):
    return analytic.estimate(config, chip, sizes(**mesh), slices)


def changed(config, **values):
    """A copy with `model__remat="dots"` and so on."""
    config = copy.deepcopy(config)
    for path, value in values.items():
        *holders, name = path.split("__")
        owner = config
        for holder in holders:
            owner = getattr(owner, holder)
        setattr(owner, name, value)
    return config


def local_bytes(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


MESHES = [
    dict(data=8),
    dict(fsdp=4, expert=2),
    dict(data=2, fsdp=2, expert=2),
    dict(data=2, expert=2, tensor=2),
    dict(fsdp=4, context=2),
]
KINDS = {
    "adamw": {},
    "average": dict(train__ema_decay=0.9),
    "adafactor": dict(optimizer=Adafactor(min_dim=16)),
    "frozen": dict(optimizer__groups=(ParamGroup(pattern="experts", frozen=True),)),
    "dense": dict(model__feed_forward=Dense(d_ff=64)),
    "mixed": dict(
        model__num_layers=4,
        model__feed_forward__first_dense=1,
        model__feed_forward__dense_d_ff=64,
        model__feed_forward__shared_d_ff=32,
        model__tie_embeddings=False,
    ),
}


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


def test_the_token_exchange_by_hand(tiny):
    tiny = changed(tiny, model__feed_forward__dispatch=Exact(capacity_factor=1.25))
    found = estimate(tiny, expert=4)
    # 64 tokens a device, float32; 4 buckets for 64 * 2 / 4 rows and a quarter more;
    # there and back, forward and backward.
    rows = 4 * 40
    payload = rows * 32 * 4
    assert found.wire["token exchange"] == 2 * 4 * payload * 3 / 4
    assert found.seconds["token exchange"] == pytest.approx(
        2 * 4 * payload * 3 / 4 / CHIP.link_bandwidth
    )
    full = estimate(changed(tiny, model__remat="full"), expert=4)
    assert full.wire["token exchange"] == 2 * 6 * payload * 3 / 4
    kept = estimate(changed(tiny, model__remat="exchanges"), expert=4)
    assert kept.wire["token exchange"] == found.wire["token exchange"]
    assert kept.wire["weight gathers"] == full.wire["weight gathers"]
    assert kept.executed_flops == full.executed_flops
    assert estimate(tiny, fsdp=4).wire["token exchange"] == 0


def test_expert_weights_are_gathered_over_fsdp_alone(tiny):
    full = changed(tiny, model__remat="full")

    def experts(config=full, **mesh):
        lay = facts.layout_of(config, sizes(**mesh))
        weights = facts.of_config(config).weights
        found = [exchanges._of_weight(lay, w) for w in weights if w.part == "experts"]
        return sum(e.cost(lay, CHIP)[0] for es in found for e in es)

    # 2 layers, 3 matrices, 4 experts; 2 gathers and a reduce-scatter.
    size = 2 * 3 * 4 * 32 * 32 * 4
    assert experts(fsdp=2, expert=4) == 3 * size / 4 / 2
    assert experts(fsdp=2) == 3 * size / 2
    # Kept for the backward pass, they are gathered once.
    assert experts(tiny, fsdp=2, expert=4) == 2 * size / 4 / 2
    assert experts(expert=4) == 0
    # Copies are summed: all-reduce over data, of what fsdp leaves of a gradient.
    assert experts(data=2, expert=4) == 2 * size / 4 / 2
    assert experts(data=2, fsdp=2) == 3 * size / 2 + 2 * (size / 2) / 2


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


def test_a_tied_matrix_crosses_for_both_of_its_uses(tiny):
    def wire(tied, rows=8):
        config = changed(tiny, model__tie_embeddings=tied, train__batch_size=rows)
        lay = facts.layout_of(config, sizes(fsdp=2, data=2))
        ends = [w for w in facts.of_config(config).weights if not w.block]
        found = [e for w in ends for e in exchanges._of_weight(lay, w)]
        return sum(e.cost(lay, CHIP)[0] for e in found)

    # Two gathers, two reduce-scatters, and two sums of halves over data.
    size, copies = 264 * 32 * 4, 2 * 2 * (264 * 32 * 4 / 2) / 2
    assert wire(True, 64) == wire(False, 64) == 4 * size / 2 + copies
    # Where they are few, the 64 tokens of a device go to the table and back.
    exchanged = 2 * 64 * 32 * 4 / 2
    assert wire(True) == wire(False) == 2 * size / 2 + exchanged + copies


def test_micro_batches_gather_again_and_exchange_the_same(tiny):
    tiny = changed(tiny, train__batch_size=64, model__remat="full")
    tiny.model.vocab_size = 8 * 264
    tiny.model.feed_forward.dispatch = Exact(capacity_factor=1.25)
    one, four = (
        estimate(changed(tiny, train__accumulation=n), data=2, fsdp=2, expert=2)
        for n in (1, 4)
    )
    assert four.wire["weight gathers"] == 4 * one.wire["weight gathers"]
    assert four.wire["token exchange"] == pytest.approx(
        one.wire["token exchange"], rel=0.1
    )
    assert four.wire["gradient sums"] == 4 * one.wire["gradient sums"]
    assert four.model_flops == one.model_flops
    assert four.memory["activations"] < one.memory["activations"] / 3
    # What is added up, and the new ones.
    assert four.memory["gradients"] > one.memory["gradients"]


def test_memory_grows_from_full_to_none(tiny):
    tiny = changed(tiny, train__batch_size=256, model__num_layers=8)
    full, exchanges, dots, none = (
        estimate(changed(tiny, model__remat=remat), expert=2).peak_bytes
        for remat in ("full", "exchanges", "dots", "none")
    )
    assert full < exchanges < none
    assert full < dots < none


def test_the_tensor_sums_by_hand(tiny):
    found = estimate(tiny, tensor=2)
    # 2 layers, attention and experts, forward and backward; float32.
    assert found.wire["tensor sums"] == 2 * 2 * 2 * 2 * (8 * 32 * 32 * 4) / 2


def test_the_context_gathers_by_hand(tiny):
    found = estimate(tiny, context=2, tensor=2)
    # Keys and values of 8 rows of 32 tokens, one of 2 heads of 8; float32; 2 layers,
    # forward and backward.
    assert found.wire["context gathers"] == 2 * 2 * (2 * 8 * 32 * 8 * 4) / 2


def test_latents_are_gathered_as_keys_and_values(tiny):
    sizes = LatentAttention(kv_rank=8, nope_dim=6, rope_dim=4, value_dim=5)
    latent = changed(tiny, model__latent=sizes, model__head_dim=0)
    latent.model.num_kv_heads, latent.model.qk_norm = 0, "none"
    found = estimate(latent, context=2)
    # Keys of 10 and values of 5 of all heads.
    heads = tiny.model.num_heads
    assert found.wire["context gathers"] == 2 * 2 * (8 * 32 * heads * 15 * 4) / 2


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


def test_slices_are_joined_by_the_slow_network(tiny):
    one = estimate(tiny, data=2, fsdp=4)
    two = estimate(tiny, data=2, fsdp=4, slices=2)
    assert two.wire == one.wire
    # A quarter of each gradient crosses; the rest is summed within the slices.
    sums = [e.seconds["gradient sums"] for e in (one, two)]
    assert sums[1] > 3 * sums[0]
    assert two.seconds["weight gathers"] == one.seconds["weight gathers"]


def test_a_long_line_slows_the_exchange(tiny):
    lay = facts.layout_of(tiny, sizes(expert=4))
    exchange = lambda n: exchanges.Exchange(
        "token exchange", "exchange", ("expert",), 1e9, 1
    ).cost(facts.dataclasses.replace(lay, sizes=sizes(expert=n)), CHIP)
    assert exchange(4)[1] == pytest.approx(0.75e9 / CHIP.link_bandwidth)
    assert exchange(16)[1] == pytest.approx(4 * 15 / 16 * 1e9 / CHIP.link_bandwidth)


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


def test_a_gathering_dispatch_sends_every_token_to_all(tiny):
    tiny = changed(tiny, model__feed_forward__dispatch=Gather())
    found = estimate(tiny, expert=4)
    # 64 tokens of 32 float32 to 3 others, and as many results back; twice.
    assert found.wire["token exchange"] == 2 * 4 * 64 * 32 * 4 * 3
    # In a ring twice forward, thrice in the reverse.
    tiny = changed(tiny, model__feed_forward__dispatch=Ring())
    found = estimate(tiny, expert=4)
    assert found.wire["token exchange"] == 2 * 5 * 64 * 32 * 4 * 3


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
