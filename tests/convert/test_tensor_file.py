"""The format of files of tensors: what is written, read, and refused."""

import json

import ml_dtypes
import numpy as np
import pytest

from moe_jax.convert import tensor_file
from moe_jax.errors import UserError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1, -2.5, 0.125], ml_dtypes.bfloat16),
    "scalar": np.array(3, np.float16),
    "empty": np.zeros((0, 4), np.float32),
    "bytes": np.array([[1, 2], [3, 255]], np.uint8),
}


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "x.safetensors")
    tensor_file.save(path, ARRAYS)
    return path


def test_what_is_written_is_read(path):
    found = tensor_file.read_header(path)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        read = found[name].array()
        assert read.dtype == array.dtype and read.shape == array.shape
        np.testing.assert_array_equal(read, array)


def test_the_bytes_are_those_of_the_format(tmp_path):
    path = tmp_path / "x"
    tensor_file.save(str(path), {"v": np.array([1.0], np.float32)})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length]) == {
        "__metadata__": {"format": "pt"},
        "v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    assert raw[8 + length :] == b"\x00\x00\x80\x3f"


def test_the_library_of_the_format_agrees(path, tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    for name, array in library.load_file(path).items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    other = str(tmp_path / "other")
    library.save_file({"a": ARRAYS["a"], "bytes": ARRAYS["bytes"]}, other)
    found = tensor_file.read_header(other)
    np.testing.assert_array_equal(found["a"].array(), ARRAYS["a"])
    np.testing.assert_array_equal(found["bytes"].array(), ARRAYS["bytes"])


def with_header(path, change):
    """Rewrites the header of a file."""
    with open(path, "rb") as file:
        raw = file.read()
    length = int.from_bytes(raw[:8], "little")
    text = change(json.loads(raw[8 : 8 + length]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def entry(name, **fields):
    def change(header):
        header[name] |= fields
        return header

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h: b"{", "its header is not JSON"),
        (lambda h: b"[" * 100_000, "its header is not JSON"),
        (lambda h: b"[1]", "its header is not a table"),
        (lambda h: {**h, "a": 3}, "entry of a is damaged"),
        (entry("a", shape=[-2, -3]), "entry of a is damaged"),
        (entry("a", shape=[2.0, 3]), "entry of a is damaged"),
        (entry("a", dtype="F99"), "a is of type 'F99', which is not known"),
        (entry("a", shape=[2, 4]), r"a is F32\[2, 4\], but the header gives it 24"),
        (entry("b", data_offsets=[20, 26]), "b overlaps the tensor before it"),
        (entry("b", data_offsets=[26, 32]), "b leaves a gap"),
        (lambda h: {n: e for n, e in h.items() if n != "bytes"}, "is longer than its"),
        (entry("bytes", data_offsets=[10**9, 10**9 + 4]), "bytes leaves a gap"),
    ],
)
def test_damaged_headers_are_refused(path, change, message):
    with_header(path, change)
    with pytest.raises(UserError, match=message):
        tensor_file.read_header(path)


@pytest.mark.parametrize("left", [0, 5, 40, -1])
def test_a_file_that_is_cut_is_refused(path, left):
    with open(path, "rb") as file:
        raw = file.read()
    with open(path, "wb") as file:
        file.write(raw[:left])
    with pytest.raises(UserError, match="is cut short"):
        tensor_file.read_header(path)


def test_a_header_that_claims_to_be_huge_is_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="cut short, or no safetensors file"):
        tensor_file.read_header(str(path))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        tensor_file.read_header(str(tmp_path / "none"))


def test_a_value_that_was_not_planned_is_a_mistake(tmp_path):
    planned = [tensor_file.Planned("a", "F32", (2,))]
    with pytest.raises(ValueError, match="got float32"):
        tensor_file.write(str(tmp_path / "x"), planned, iter([np.zeros(3, np.float32)]))
