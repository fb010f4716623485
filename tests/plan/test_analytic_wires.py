"""Bytes on the wire by hand."""

import pytest
from estimating import CHIP, TINY, changed, estimate, sizes

from moe_jax.cli import config_file
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.moe.dispatch.ring import Ring
from moe_jax.nn.attention.latent import LatentAttention
from moe_jax.plan import exchanges, facts


@pytest.fixture
def tiny():
    """4 experts, 2 of them a token, 2 layers, width 32; 8 rows of 32 tokens."""
    return config_file.load(str(TINY))


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


def test_a_gathering_dispatch_sends_every_token_to_all(tiny):
    tiny = changed(tiny, model__feed_forward__dispatch=Gather())
    found = estimate(tiny, expert=4)
    # 64 tokens of 32 float32 to 3 others, and as many results back; twice.
    assert found.wire["token exchange"] == 2 * 4 * 64 * 32 * 4 * 3
    # In a ring twice forward, thrice in the reverse.
    tiny = changed(tiny, model__feed_forward__dispatch=Ring())
    found = estimate(tiny, expert=4)
    assert found.wire["token exchange"] == 2 * 5 * 64 * 32 * 4 * 3
