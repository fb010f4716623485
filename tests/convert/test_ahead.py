"""DeepSeek-V3's modules that predict further: layers after the last in the files."""

import pathlib

import hand_made
import jax
import numpy as np
import pytest

from moe_jax.cli import config_file
from moe_jax.config import MeshConfig
from moe_jax.convert import load, mapping, store, tensor_file
from moe_jax.convert.from_hf import FAMILIES
from moe_jax.convert.quantized import whole
from moe_jax.errors import UserError
from moe_jax.train import setup

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "lm" / "tiny_deepseek_v3.py"
FAMILY = FAMILIES["deepseek_v3"]
AT = "model.layers.4."


def parts_with(mtp):
    config = config_file.load(str(RECIPE))
    config.model.mtp, config.mesh = mtp, MeshConfig(data=2, expert=4)
    return setup.make_parts(config)


def wanted_of(parts):
    abstract = parts.abstract
    leaves = mapping.leaves_of(abstract.all_params, abstract.router_state)
    return mapping.places(FAMILY, parts.model, leaves), leaves


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Random leaves by path, and the folder they were written to."""
    hub = tmp_path_factory.mktemp("hub")
    parts = parts_with(1)
    wanted, leaves = wanted_of(parts)
    rng = np.random.default_rng(0)
    arrays = {
        name: jax.device_put(
            rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding
        )
        for name, leaf in leaves.items()
    }
    tensors = store.by_tensor(wanted)
    planned = store.planned(tensors, dict.fromkeys(tensors, "F32"))
    store.write(str(hub), tensors, store.files(planned, 10**9), arrays)
    return arrays, hub


def tensors_of(hub):
    return whole(tensor_file.read_header(str(hub / "model.safetensors")), (128, 128))


def test_where_its_tensors_are(written):
    arrays, hub = written
    found, ahead = hand_made.read(hub), "params/mtp_0/"
    for name, leaf in (
        ("enorm", "embedding_norm/scale"),
        ("hnorm", "hidden_norm/scale"),
        ("shared_head.norm", "norm/scale"),
        ("input_layernorm", "block/attention_norm/scale"),
    ):
        np.testing.assert_array_equal(found[f"{AT}{name}.weight"], arrays[ahead + leaf])
    # The embedding's half stands first in both.
    project = np.asarray(arrays[f"{ahead}project"])
    assert project.shape == (128, 64)
    np.testing.assert_array_equal(found[f"{AT}eh_proj.weight"], project.T)
    np.testing.assert_array_equal(
        found[f"{AT}mlp.gate.e_score_correction_bias"],
        arrays["router_state/mtp_0/block/bias"][0],
    )
    np.testing.assert_array_equal(
        found[f"{AT}mlp.experts.5.up_proj.weight"],
        arrays[f"{ahead}block/moe/experts/w_up"][5].T,
    )
    bias = "router_state/segment_1/block_0/bias"
    np.testing.assert_array_equal(
        found["model.layers.3.mlp.gate.e_score_correction_bias"], arrays[bias][2]
    )


def test_they_come_back_where_they_are_asked_for(written):
    arrays, hub = written
    parts = parts_with(1)
    wanted, leaves = wanted_of(parts)
    tensors = tensors_of(hub)
    assert mapping.check(wanted, tensors, parts.model, ahead=1) == []
    found = load.arrays(wanted, tensors, leaves)
    found = mapping.leaves_of(found["params"], found["router_state"])
    assert found.keys() == arrays.keys()
    for name, leaf in arrays.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
        assert found[name].sharding == leaf.sharding


def test_else_they_are_left_out_and_it_is_said(written):
    _, hub = written
    parts = parts_with(0)
    wanted, _ = wanted_of(parts)
    (line,) = mapping.check(wanted, tensors_of(hub), parts.model, ahead=1)
    assert "tensors of layers [4], which predict further tokens" in line
    with pytest.raises(UserError, match=r"model\.layers\.4\..* has no place"):
        mapping.check(wanted, tensors_of(hub), parts.model, ahead=0)
    with pytest.raises(UserError, match=r"model\.layers\.5\..* is missing"):
        parts = parts_with(2)
        mapping.check(wanted_of(parts)[0], tensors_of(hub), parts.model, ahead=1)


def test_copies_of_embedding_and_output_are_left_out(written):
    _, hub = written
    parts, tensors = parts_with(1), tensors_of(hub)
    for name in ("embed_tokens", "shared_head.head"):
        tensors[f"{AT}{name}.weight"] = tensors["lm_head.weight"]
    (line,) = mapping.check(wanted_of(parts)[0], tensors, parts.model, ahead=1)
    assert "copies of embedding and output" in line


def test_a_leaf_without_a_tensor_is_refused():
    parts = parts_with(0)
    _, leaves = wanted_of(parts)
    with pytest.raises(UserError, match="mixtral have nothing that corresponds to"):
        mapping.places(FAMILIES["mixtral"], parts.model, leaves)
