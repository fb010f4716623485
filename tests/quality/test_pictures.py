"""Pictures are read back as they were meant."""

import io

import numpy as np
import pytest
from PIL import Image

from moe_jax.data.images import pixels
from moe_jax.errors import UserError
from moe_jax.observe import writers
from moe_jax.quality import pictures


def read(path):
    with Image.open(path) as image:
        return np.asarray(image), image.mode


def test_pixels_there_and_back():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(pictures.to_uint8(pixels.values(values)), values)
    given = np.array([-9, -1, -0.9961, 0.0, 0.9959, 1, 9])
    found = pictures.to_uint8(given.reshape(1, 1, 7, 1)).ravel()
    assert found.tolist() == [0, 0, 0, 128, 254, 255, 255]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png(tmp_path, channels, mode):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 40, 33, channels), np.uint8)
    path = tmp_path / "new" / "grid.png"
    pictures.write_png(path, pictures.grid(pixels.values(images), columns=3))
    found, found_mode = read(path)
    assert found_mode == mode and found.shape[:2] == (2 * 42 + 2, 3 * 35 + 2)
    found = found.reshape(86, 107, channels)
    for i, image in enumerate(images):
        top, left = 2 + i // 3 * 42, 2 + i % 3 * 35
        np.testing.assert_array_equal(found[top : top + 40, left : left + 33], image)
    rest = found.astype(int).sum() - images.astype(int).sum()
    assert rest == 255 * channels * (86 * 107 - 5 * 40 * 33)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_small_images_are_enlarged():
    images = np.arange(64, dtype=np.uint8).reshape(4, 4, 4, 1)
    found = pictures.grid(images, padding=0)
    assert found.shape == (64, 64, 1)  # two by two, each pixel eight by eight
    np.testing.assert_array_equal(found[4::8, 4::8, 0][:4, :4], images[0, :, :, 0])
    assert (found[:8, :8] == images[0, 0, 0]).all()
    assert pictures.grid(images, 4, 0, smallest_side=0).shape == (4, 16, 1)


def test_pairs_stand_side_by_side():
    a, b = -np.ones((3, 32, 32, 1)), np.ones((3, 32, 32, 1))
    found = pictures.pairs(a, b, columns=2, padding=0)[..., 0]
    assert found.shape == (64, 128)
    assert found[0, ::32].tolist() == [0, 255, 0, 255]
    assert found[32, ::32].tolist() == [0, 255, 255, 255]  # then paper


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (2, 4, 4, 2), (4, 4, 1)])
def test_latents_are_refused(shape):
    with pytest.raises(UserError, match="latents are no pixels and need their decoder"):
        pictures.grid(np.zeros(shape))


def test_other_refusals(tmp_path):
    images = np.zeros((3, 4, 4, 1))
    images[1:, 2, 2] = np.nan
    with pytest.raises(UserError, match=r"2 of 3 have pixels .* first image 1; the"):
        pictures.to_uint8(images)
    with pytest.raises(UserError, match="there are none"):
        pictures.grid(images[:0])
    made = pictures.grid(np.zeros((1, 4, 4, 1)))
    with pytest.raises(UserError, match=r"let it end in \.png"):
        pictures.write_png(tmp_path / "grid.jpg", made)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        pictures.write_png(tmp_path / "file" / "grid.png", made)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        pictures.write_png(tmp_path / "folder.png", made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_tensorboard(tmp_path, channels):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (20, 30, channels), np.uint8)
    board = writers.TensorBoard(tmp_path)
    board.image(3, "samples", made)
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Images("samples")
    assert event.step == 3
    found = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    np.testing.assert_array_equal(found, np.broadcast_to(made, (20, 30, 3)))
