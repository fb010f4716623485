"""The table from logical axes to mesh axes."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.parallel import mesh, rules


def test_specs_by_hand():
    assert rules.spec(("batch", "sequence", None)) == P(
        ("data", "fsdp", "expert"), "context", None
    )
    assert rules.spec(("expert", "expert_embed", "expert_mlp")) == P(
        "expert", "fsdp", "tensor"
    )
    assert rules.spec(("vocab", "embed")) == P("tensor", ("fsdp", "expert"))
    assert rules.spec((None, "heads", None)) == P(None, "tensor", None)
    assert rules.spec(()) == P()


@pytest.mark.parametrize(
    ("group", "weights", "tokens"),
    [
        (("expert",), P("expert", "fsdp", "tensor"), "context"),
        (
            ("expert", "tensor"),
            P(("expert", "tensor"), "fsdp", None),
            ("context", "tensor"),
        ),
        (("fsdp", "expert"), P(("fsdp", "expert"), None, "tensor"), "context"),
        (("expert", "context"), P(("expert", "context"), "fsdp", "tensor"), "context"),
    ],
)
def test_experts_split_over_several_axes(group, weights, tokens):
    """An axis splits a weight once, and tokens are split over the whole group."""
    named = lambda *axes: rules.spec(tuple(rules.grouped(a, group) for a in axes))
    assert named("expert", "expert_embed", "expert_mlp") == weights
    batch = ("data", "fsdp", "expert")
    assert named("batch", "sequence", None) == P(batch, tokens, None)


def test_an_unknown_axis_is_an_error():
    with pytest.raises(KeyError, match="width"):
        rules.spec(("width",))


def test_the_table_names_axes_of_the_mesh_only():
    assert {a for axes in rules.RULES.values() for a in axes} == set(mesh.AXES)
    batch_and_sequence = rules.RULES["batch"] + rules.RULES["sequence"]
    assert batch_and_sequence == mesh.TOKEN_AXES


def test_sizes_and_shards(axes_mesh):
    made = axes_mesh(data=2, fsdp=2, expert=2)
    assert rules.size(made, "batch") == 8
    assert rules.size(made, "embed") == 4
    assert rules.size(made, "expert") == 2
    assert rules.size(made, "vocab") == 1
    assert rules.size(jax.sharding.get_abstract_mesh(), "batch") == 1
    tree = {"w": ("expert", "expert_embed", "expert_mlp"), "scale": (None,)}
    shardings = rules.tree_shardings(made, tree)
    w = jax.device_put(np.zeros((8, 16, 24), np.float32), shardings["w"])
    scale = jax.device_put(np.zeros(16, np.float32), shardings["scale"])
    assert {s.data.shape for s in w.addressable_shards} == {(4, 8, 24)}
    assert {s.data.shape for s in scale.addressable_shards} == {(16,)}


def test_constrain_pins_the_layout_where_a_mesh_is_set(axes_mesh):
    x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    pin = lambda x: rules.constrain(x, "batch", "sequence")
    assert rules.constrain(x, "batch", "sequence") is x
    with jax.set_mesh(axes_mesh(data=2, expert=2, context=2)):
        y = jax.jit(pin)(x)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(y, x)


def test_what_cannot_be_split_stays_whole(axes_mesh):
    axes = ("batch", "sequence", None)
    assert rules.fitting(axes, (3, 5, 7)) == axes  # Without a mesh.
    with jax.set_mesh(axes_mesh(data=2, expert=2, context=2)):
        assert rules.fitting(axes, (4, 2, 7)) == axes
        assert rules.fitting(axes, (4, 1, 7)) == ("batch", None, None)
        assert rules.fitting(axes, (2, 2, 7)) == (None, "sequence", None)
