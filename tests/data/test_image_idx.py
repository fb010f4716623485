"""Images of IDX files, the format of MNIST."""

import dataclasses
import gzip
import struct

import numpy as np
import pytest
from stored_images import assert_holds, expected, stored

from moe_jax import config as config_lib
from moe_jax.data import pipeline
from moe_jax.data.images import sources
from moe_jax.errors import UserError


def idx_bytes(array, code=0x08):
    head = struct.pack(">BBBB", 0, 0, code, array.ndim)
    head += struct.pack(f">{array.ndim}I", *array.shape)
    big = array.astype(array.dtype.newbyteorder(">"))
    return head + big.tobytes()


@pytest.fixture
def idx_files(tmp_path, image_arrays):
    images, labels = image_arrays
    (tmp_path / "images").write_bytes(idx_bytes(images[..., 0]))
    packed = gzip.compress(idx_bytes(labels.astype(np.int32), 0x0C))
    (tmp_path / "labels.gz").write_bytes(packed)
    return sources.Idx(
        images=str(tmp_path / "images"), labels=str(tmp_path / "labels.gz")
    )


def test_idx(idx_files, image_arrays, make_images):
    images, labels = image_arrays
    data = assert_holds(make_images(idx_files), images[..., 0], labels)
    assert data.classes == ("0", "1", "2")
    assert data.image_shape == (5, 6, 1)


def test_idx_with_a_validation_split(idx_files, image_arrays, make_images, tmp_path):
    images, labels = image_arrays
    (tmp_path / "more").write_bytes(idx_bytes(images[:7, ..., 1]))
    (tmp_path / "more_labels").write_bytes(idx_bytes(labels[:7].astype(np.uint8)))
    source = dataclasses.replace(
        idx_files,
        validation_images=str(tmp_path / "more"),
        validation_labels=str(tmp_path / "more_labels"),
    )
    config = make_images(source, validation_fraction=0.0)
    assert not list(config_lib.all_problems(config.data, "config.data", config))
    _, found = stored(config)
    assert found["train"] == expected(images[..., 0], labels)
    assert found["validation"] == expected(images[:7, ..., 1], labels[:7])


def cut(content):
    return content[:-1]


def swapped(content):
    return b"\1" + content[1:]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("images", cut, r"images=.*IDX file of \d+ bytes, its head says"),
        ("images", lambda content: content[:6], "its head says"),
        ("images", swapped, "images=.*no IDX file"),
        ("images", lambda content: b"", "no IDX file"),
        ("labels.gz", cut, "labels=.*damaged gzip"),
        ("labels.gz", lambda c: c[:20] + b"xx" + c[22:], "damaged gzip"),
        ("labels.gz", lambda _: idx_bytes(np.zeros(59, "u1")), "60 images and 59 labe"),
        (
            "labels.gz",
            lambda _: idx_bytes(np.zeros(60, "u1")),
            "of class '0'; there is",
        ),
        ("labels.gz", lambda _: idx_bytes(np.arange(60.0), 0x0E), "must be whole numb"),
        (
            "labels.gz",
            lambda _: idx_bytes(np.arange(60, dtype="i4") - 3, 0x0C),
            "lab.*-3",
        ),
        ("labels.gz", lambda _: idx_bytes(np.arange(60, dtype="i4") * 9, 0x0C), "gaps"),
        (
            "images",
            lambda _: idx_bytes(np.zeros(60, "u1")),
            "is it the file of the lab",
        ),
    ],
)
def test_idx_errors(idx_files, make_images, tmp_path, name, change, message):
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        pipeline.prepare(make_images(idx_files))


def test_idx_missing(idx_files, make_images, tmp_path):
    (tmp_path / "images").unlink()
    with pytest.raises(UserError, match=r"images=.*No such file"):
        pipeline.prepare(make_images(idx_files))
