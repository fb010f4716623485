"""Files of data, changed: read as what they are, or one clear message."""

import gzip
import io
import json
import pathlib
import struct
import zipfile

import hypothesis
import mutations
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from moe_jax.data import documents, prepared, token_file
from moe_jax.data.images import pixels
from moe_jax.data.images.sources import files, idx


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that is alone in its own: nothing may appear beside it."""
    made = tmp_path_factory.mktemp("data") / "inside"
    made.mkdir()
    yield made
    assert [p.name for p in made.parent.iterdir()] == ["inside"]


def _idx():
    images = np.arange(2 * 3 * 3, dtype=np.uint8)
    return b"\0\0\x08\x03" + struct.pack(">III", 2, 3, 3) + images.tobytes()


def _npz():
    buffer = io.BytesIO()
    images = np.zeros((4, 6, 6), np.uint8)
    np.savez_compressed(buffer, images=images, labels=np.arange(4) % 2)
    return buffer.getvalue()


def _npy():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 3, 3, 2), np.float32))
    return buffer.getvalue()


def _pictures():
    found = []
    for form, mode in (("PNG", "RGB"), ("PNG", "LA"), ("PNG", "P"), ("JPEG", "RGB")):
        buffer = io.BytesIO()
        Image.new(mode, (5, 4)).save(buffer, form)
        found.append(buffer.getvalue())
    return found


BASES = [_idx(), gzip.compress(_idx(), mtime=0)]


@mutations.settings(60)
@hypothesis.given(content=st.sampled_from(BASES).flatmap(mutations.byte_strings))
def test_idx(content, place, clear):
    (place / "idx").write_bytes(content)
    found = clear(lambda: idx.read(str(place / "idx"), "images"))
    assert found is None or found.nbytes < 1 << 20


@st.composite
def archives(draw):
    """Npz files: changed as bytes, or of members that are changed."""
    if draw(st.booleans()):
        return draw(mutations.byte_strings(_npz()))
    buffer = io.BytesIO()
    kind = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name in ("images.npy", "labels.npy"):
            archive.writestr(name, draw(headers()))
    return buffer.getvalue()


@st.composite
def headers(draw):
    """Npy files whose heads say something else than their bytes."""
    if draw(st.integers(0, 2)) == 0:
        return draw(mutations.byte_strings(_npy()))
    number = st.sampled_from([*mutations.NUMBERS, 4, 36, 10**12])
    shape = draw(st.lists(number, max_size=4).map(tuple))
    types = ["|u1", "<i8", "|O", "<f4", "|V7", "<U9", "|S0", "[('a','|O')]", "x" * 99]
    head = {
        "descr": draw(st.sampled_from(types)),
        "fortran_order": draw(st.booleans()),
        "shape": shape,
    }
    text = repr(draw(st.one_of(st.just(head), mutations.json_values(head)))).encode(
        "utf-8", "surrogatepass"
    )
    version = draw(st.sampled_from([b"\x01\0", b"\x02\0", b"\x03\0", b"\x09\0"]))
    pack = "<H" if version == b"\x01\0" else "<I"
    length = struct.pack(pack, min(len(text) + 1, 65535))
    return b"\x93NUMPY" + version + length + text + b"\n" + bytes(144)


@mutations.settings(60)
@hypothesis.given(content=archives())
def test_npz(content, place, clear):
    (place / "x.npz").write_bytes(content)
    names = ["images", "labels"]
    found = clear(lambda: files.arrays(str(place / "x.npz"), "path", names))
    assert found is None or all(array.dtype != object for array in found)


@mutations.settings(60)
@hypothesis.given(content=headers())
def test_npy(content, place, clear):
    (place / "x.npy").write_bytes(content)
    found = clear(lambda: files.array(str(place / "x.npy"), "images"))
    assert found is None or found.nbytes <= len(content)


@mutations.settings(60)
@hypothesis.given(content=st.sampled_from(_pictures()).flatmap(mutations.byte_strings))
def test_pictures(content, clear):
    found = clear(lambda: pixels.decode(content, "x"))
    assert found is None or found.dtype in (np.uint8, np.uint16)


def _tokens(folder: pathlib.Path):
    """A prepared folder, by hand."""
    splits = {}
    for name in documents.SPLITS:
        with prepared.Hashed(folder / f"{name}.tokens") as file:
            file.write(np.arange(6, dtype=np.uint16).tobytes())
        offsets = prepared.write_array(
            folder / f"{name}.offsets.npy", np.array([0, 2, 6])
        )
        splits[name] = {
            "documents": 2,
            "tokens": 6,
            "bytes": 6,
            "files": {"tokens": file.entry(), "offsets": offsets},
        }
    return {
        "format_version": token_file.FORMAT_VERSION,
        "source": {"kind": "text_files", "sha256": "0"},
        "vocab_size": 258,
        "dtype": "uint16",
        "splits": splits,
    }


@mutations.settings(60)
@hypothesis.given(data=st.data())
def test_token_files(data, place, clear):
    folder = place / "tokens"
    folder.mkdir(exist_ok=True)
    manifest = _tokens(folder)
    (folder / "manifest.json").write_bytes(data.draw(mutations.json_files(manifest)))
    if data.draw(st.booleans()):
        content = data.draw(headers())
        (folder / "train.offsets.npy").write_bytes(content)
        manifest["splits"]["train"]["files"]["offsets"]["size_bytes"] = len(content)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    found = clear(
        lambda: token_file.read(folder), prepared.DamagedError, FileNotFoundError
    )
    for part in (found or (None, {}))[1].values():
        assert part.tokens.nbytes <= 64 and len(part.offsets) <= 64
