"""Files and arrays of all sorts become uint8 images, or one message."""

import io
import types

import numpy as np
import pytest
from PIL import Image

from moe_jax.data.images import pixels
from moe_jax.errors import UserError

AS_THEY_ARE = types.SimpleNamespace(image_size=0, channels=0)


def file(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def convert(image, **fields):
    data = types.SimpleNamespace(**(vars(AS_THEY_ARE) | fields))
    return pixels.convert(image, "name", data)


GREY = np.array([[0, 10, 20], [30, 40, 255]], np.uint8)
COLOUR = np.stack([GREY, GREY // 2, 255 - GREY], axis=-1)


@pytest.mark.parametrize("array", [GREY, COLOUR])
def test_png_and_array_give_the_same_pixels(array):
    want = array.reshape(2, 3, -1)
    for given in (array, file(Image.fromarray(array))):
        got, notes = convert(given)
        np.testing.assert_array_equal(got, want)
        assert got.dtype == np.uint8 and not notes


def test_jpeg_is_near():
    smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
    got, _ = convert(file(Image.fromarray(smooth), "JPEG", quality=95))
    assert got.shape == (16, 16, 1)
    assert np.abs(got[..., 0].astype(int) - smooth).max() <= 4


def test_alpha_is_laid_over_white():
    # Transparent gives white, opaque itself, half of 100 at 51/255: 0.2*100 + 0.8*255.
    image = np.array([[[7, 8, 9, 0], [7, 8, 9, 255], [100, 0, 255, 51]]], np.uint8)
    want = [[[255, 255, 255], [7, 8, 9], [224, 204, 255]]]
    for given in (image, file(Image.fromarray(image))):
        got, notes = convert(given)
        np.testing.assert_array_equal(got, want)
        assert notes == {"alpha laid over white"}
    got, _ = convert(image[..., 2:])  # grey with alpha
    np.testing.assert_array_equal(got, [[[255], [9], [255]]])


def test_transparent_colours_of_a_png_are_alpha():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(
        convert(file(palette))[0], [[[10, 20, 30], [40, 50, 60]]]
    )
    got, notes = convert(file(palette, transparency=1))
    np.testing.assert_array_equal(got, [[[10, 20, 30], [255, 255, 255]]])
    assert notes == {"alpha laid over white"}
    grey = Image.fromarray(np.array([[0, 9]], np.uint8))
    np.testing.assert_array_equal(
        convert(file(grey, transparency=0))[0], [[[255], [9]]]
    )


def test_sixteen_bits_keep_the_high_byte():
    image = np.array([[0, 255, 256, 65535]], np.uint16)
    for given in (image, file(Image.fromarray(image))):
        got, notes = convert(given)
        np.testing.assert_array_equal(got, [[[0], [0], [1], [255]]])
        assert notes == {"16 bits cut to 8"}


def test_one_bit_is_black_and_white():
    image = np.array([[True, False]])
    for given in (image, file(Image.fromarray(image))):
        np.testing.assert_array_equal(convert(given)[0], [[[255], [0]]])


def test_cmyk_is_colour():
    got, _ = convert(file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert got.shape == (8, 8, 3)
    assert got[4, 4, 0] > 200 and got[4, 4, 1:].max() < 60  # red


def test_exif_turns_upright():
    image = Image.fromarray(np.zeros((8, 16), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by a quarter
    assert convert(file(image, "JPEG", exif=exif))[0].shape == (16, 8, 1)


def test_channels():
    got, notes = convert(
        np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8), channels=1
    )
    np.testing.assert_array_equal(got, [[[76], [150], [29]]])  # .299, .587, .114 of 255
    assert notes == {"colour made grey"}
    got, notes = convert(GREY, channels=3)
    np.testing.assert_array_equal(got, np.stack([GREY] * 3, -1))
    assert notes == {"grey repeated as colour"}
    assert convert(COLOUR, channels=3)[1] == set()


@pytest.mark.parametrize("channels", [1, 3])
def test_size_cuts_the_middle_and_scales(channels):
    # A wide image: black, a grey square in the middle, white.
    image = np.zeros((8, 24, channels), np.uint8)
    image[:, 8:16], image[:, 16:] = 100, 255
    got, notes = convert(image, image_size=4)
    np.testing.assert_array_equal(got, np.full((4, 4, channels), 100))
    assert notes == {"cut to a square and scaled"}
    assert convert(image[:, :8], image_size=8)[1] == set()
    assert convert(image[:2, :2], image_size=8)[0].shape == (8, 8, channels)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        file(Image.fromarray(COLOUR))[:-20],
        file(Image.fromarray(COLOUR))[:40],
        file(Image.new("RGB", (64, 64)), "JPEG")[:300],
        file(Image.new("RGB", (4, 4)), "GIF"),
        file(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"),
    ],
)
def test_damaged_or_other_files(content):
    with pytest.raises(UserError, match="image 'name' cannot be read as PNG or JPEG"):
        convert(content)


def test_flipped_bit_is_seen():
    content = bytearray(file(Image.fromarray(COLOUR)))
    content[content.index(b"IDAT") + 8] ^= 1
    with pytest.raises(UserError, match="image 'name' cannot be read"):
        convert(bytes(content))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 4), float), ((4,), np.uint8), ((4, 4, 5), np.uint8), ((0, 4), np.uint8)],
)
def test_arrays_that_are_no_images(shape, dtype):
    with pytest.raises(UserError, match=r"image 'name' is \w+ \(.*; images are uint8"):
        convert(np.zeros(shape, dtype))


def test_values():
    got = pixels.values(np.array([0, 51, 102, 255], np.uint8))
    np.testing.assert_allclose(got, [-1, -0.6, -0.2, 1], atol=1e-7)
    assert got.dtype == np.float32 and got[-1] == 1
