"""Names in a model's files stay in its folder; what a file claims is not allocated."""

import json

import hand_made
import numpy as np
import pytest

from moe_jax.convert import folder, tensor_file
from moe_jax.errors import UserError

ONE = {"a": np.ones(3, np.float32)}


@pytest.fixture
def indexed(tmp_path):
    """Makes a folder whose index says where the tensor `a` is."""

    def make(name):
        made = tmp_path / "model"
        made.mkdir()
        tensor_file.save(str(tmp_path / "outside.safetensors"), ONE)
        index = {"weight_map": {"a": str(name)}}
        (made / folder.INDEX).write_text(json.dumps(index))
        return made

    return make


@pytest.mark.parametrize("name", ["../outside.safetensors", "", ".", "..", "x/y", 3])
def test_an_index_names_files_of_its_folder(name, indexed):
    made = indexed(name)
    with pytest.raises(UserError):
        folder.read_tensors(str(made), {})


def test_an_absolute_name(indexed, tmp_path):
    made = indexed(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match="which is no file name"):
        folder.read_tensors(str(made), {})


def test_a_link_that_leads_out(indexed, tmp_path):
    made = indexed("part.safetensors")
    (made / "part.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match="a link that leads out of the folder, to /"):
        folder.read_tensors(str(made), {})


def test_a_link_within_the_folder(indexed):
    made = indexed("part.safetensors")
    tensor_file.save(str(made / "other"), ONE)
    (made / "part.safetensors").symlink_to("other")
    assert list(folder.read_tensors(str(made), {})) == ["a"]


def test_the_cache_of_the_hub_consists_of_links(tmp_path):
    blobs, made = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    made.mkdir(parents=True)
    tensor_file.save(str(blobs / "123"), ONE)
    (made / folder.SINGLE).symlink_to("../../blobs/123")
    assert list(folder.read_tensors(str(made), {})) == ["a"]
    (made / folder.SINGLE).unlink()
    tensor_file.save(str(tmp_path / "secret"), ONE)
    (made / folder.SINGLE).symlink_to("../../secret")
    with pytest.raises(UserError, match="leads out"):
        folder.read_tensors(str(made), {})


def test_nothing_from_elsewhere_is_carried_along(tmp_path):
    """A link to a secret must not become a file of an exported model."""
    source = tmp_path / "model"
    hand_made.write(source, hand_made.tensors())
    (tmp_path / "secret").write_text("key")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leads out"):
        folder.copy_beside(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_001, 9])
def test_a_header_that_claims_to_be_long(length, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="is cut short, or no safetensors file"):
        tensor_file.read_header(str(path))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": {"a": 1}, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        [],
        None,
    ],
)
def test_an_entry_that_is_none(entry, tmp_path):
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(UserError, match=r"damaged|not known|cut short"):
        tensor_file.read_header(str(path))


@pytest.mark.parametrize("text", ["[" * 10**5, "1" * 10**4, "\udcff", "[]"])
def test_json_that_is_none(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"is not JSON|must hold a JSON object"):
        folder.read_json(str(path))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": {"": 0}},
        {"rope_scaling": "x"},
        {"rope_scaling": {"rope_type": []}},
        {"num_attention_heads": 0},
        {"quantization_config": [1]},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": 5}},
    ],
)
def test_values_of_another_kind(change, tmp_path):
    from moe_jax.convert import from_hf

    hand_made.write(tmp_path / "m", hand_made.tensors())
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    request = from_hf.Request(checkpoint=str(tmp_path / "m"), workdir="x")
    with pytest.raises(UserError):
        from_hf.config_of(from_hf.read(str(tmp_path / "m")), request)
