"""Which leaves of a train state count experts, and in which dimension."""

from moe_jax.train import setup
from moe_jax.train.optimizers import AdamW
from moe_jax.tree import named_leaves


def test_weights_moments_and_average(make_tiny):
    config = make_tiny(data=4, expert=2)
    config.train.ema_decay = 0.9
    parts = setup.make_parts(config)
    found, leaves = parts.experts, named_leaves(parts.abstract)
    assert {leaves[name].shape[dim] for name, dim in found.items()} == {4}
    # Two layers are stacked: their dimension comes first.
    assert set(found.values()) == {1}
    by_hand = {name for name in leaves if "/experts/" in name}
    assert set(found) == by_hand
    kinds = [name.split("/")[0] for name in found]
    assert kinds.count("params") == kinds.count("ema") == len(by_hand) // 4
    assert kinds.count("opt_state") == len(by_hand) // 2


def test_experts_over_two_axes_and_moments_in_blocks(make_tiny):
    config = make_tiny(data=2, expert=2, tensor=2)
    config.model.feed_forward.expert_axes = ("expert", "tensor")
    config.model.vocab_size = 272
    config.model.d_model = config.model.feed_forward.experts.d_ff = 64
    eight_bits = dict(momentum_dtype="int8", variance_dtype="int8", block_size=8)
    config.optimizer = AdamW(**eight_bits)
    parts = setup.make_parts(config)
    leaves = named_leaves(parts.abstract)
    found = {name: leaves[name].shape[dim] for name, dim in parts.experts.items()}
    assert set(found.values()) == {4}
    codes = [name for name in found if "/code/" in name]
    scales = [name for name in found if "/scale/" in name]
    assert len(codes) == len(scales) == 2 * 3
    assert all(leaves[name].shape[2:] != (64, 64) for name in scales)
