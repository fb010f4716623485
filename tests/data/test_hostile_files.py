"""Data files that name other files or claim to be larger than they are."""

import gzip
import io
import struct
import zipfile
import zlib

import pytest

from moe_jax.data import prepared
from moe_jax.data.images import pixels
from moe_jax.data.images.sources import files, idx
from moe_jax.data.sources import text_files
from moe_jax.errors import UserError


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "..", "a/b", "link"])
def test_a_manifest_names_files_of_its_folder(name, tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    (tmp_path / "x").write_bytes(b"1234")
    (folder / "link").symlink_to(tmp_path / "x")
    with pytest.raises(prepared.DamagedError):
        prepared.checked(folder, {"name": name, "size_bytes": 4})


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"1234")
    (tmp_path / "here").symlink_to("real")
    found = prepared.checked(tmp_path / "here", {"name": "x", "size_bytes": 4})
    assert found.read_bytes() == b"1234"


@pytest.mark.parametrize(
    "text", ["[" * 10**5, "1" * 10**4, "[]", '{"format_version": {}}', "{}", "\0"]
)
def test_a_manifest_that_is_none(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(prepared.DamagedError), prepared.damage():
        prepared.read_manifest(tmp_path, 1)


def test_links_out_of_a_folder_of_texts_or_images(tmp_path):
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"1")
    (folder / "a" / "x.png").write_bytes(b"2")
    (folder / "a" / "y.png").symlink_to("x.png")
    assert len(list(text_files.files_below(folder))) == 2
    (folder / "a" / "z.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="leads out of the folder, to"):
        list(text_files.files_below(folder))
    # A folder that is linked is not entered.
    (folder / "a" / "z.png").unlink()
    (folder / "b").symlink_to(tmp_path)
    assert len(list(text_files.files_below(folder))) == 2


def head(*shape, kind=0x08):
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


@pytest.mark.parametrize(
    "content",
    [
        head(2**32 - 1, 2**32 - 1, 2**32 - 1) + b"x",
        head(0, 2**32 - 1, 2**32 - 1),
        head(*[1] * 200) + b"x",
        head() + b"x",
        b"\0\0\x08",
        gzip.compress(head(2**30) + b"x", mtime=0),
        gzip.compress(head(100) + bytes(10**7), mtime=0),
        gzip.compress(head(100) + bytes(100), mtime=0)[:-6],
        b"\x1f\x8b" + bytes(20),
    ],
)
def test_idx_heads(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.source\.images=.*cannot be read"):
        idx.read(str(tmp_path / "x"), "images")


def npy(descr="|u1", shape=(4,), version=(1, 0), body=bytes(4)):
    buffer = io.BytesIO()
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    pack = "<H" if version == (1, 0) else "<I"
    buffer.write(b"\x93NUMPY" + bytes(version))
    buffer.write(struct.pack(pack, len(text) + 1) + text + b"\n" + body)
    return buffer.getvalue()


HEADS = {
    "huge": npy(shape=(10**12,)),
    "negative": npy(shape=(-1, -4)),
    "pickled": npy(descr="|O", body=b"cos\nsystem\n(S'false'\ntR."),
    "a list": npy(descr=[("a", "|O")]),
    "no type": npy(descr=()),
    "beyond int": npy(shape=(2**80,)),
    "version 3": npy(version=(3, 0)),
    "version 9": npy(version=(9, 0)),
    "empty": b"",
    "no head": b"\x93NUMPY",
}


@pytest.mark.parametrize("name", HEADS)
def test_npz_members_and_npy_files(name, tmp_path):
    (tmp_path / "x.npy").write_bytes(HEADS[name])
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", HEADS[name])
    with pytest.raises(UserError, match="cannot be read"):
        files.arrays(str(tmp_path / "x.npz"), "path", ["images"])
    if name != "version 3":
        with pytest.raises(UserError, match="cannot be read"):
            files.array(str(tmp_path / "x.npy"), "path")


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images", b"x")
    with pytest.raises(UserError, match="cannot be read"):
        files.arrays(str(tmp_path / "x.npz"), "path", ["images"])


def test_a_picture_that_claims_to_be_vast():
    def chunk(kind, body):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    size = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10**6))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows)
    with pytest.raises(UserError, match=r"'big\.png' cannot be read"):
        pixels.decode(png + chunk(b"IEND", b""), "big.png")
