"""What each source of images gives, and what it says where there is nothing to give."""

import os

import numpy as np
import pytest
from PIL import Image
from stored_images import assert_holds, stored

from moe_jax import config as config_lib
from moe_jax.data import documents, pipeline
from moe_jax.data.images import sources
from moe_jax.data.images.sources import files
from moe_jax.errors import UserError


def test_every_source_is_registered():
    # By name: the classes that `slots=True` replaced may be listed, too.
    known = {cls.__qualname__ for cls in config_lib.ImageSourceConfig.__subclasses__()}
    assert {cls.__qualname__ for cls in sources.SOURCES} == known


def test_digits(make_images):
    data, found = stored(make_images(sources.Digits()))
    assert data.image_shape == (8, 8, 1) and data.num_classes == 10
    assert sum(map(len, found.values())) == 1797
    # The first rows of the published file: 0, 0, 5, 13, 9, 1, 0, 0 of a zero.
    rows = np.frombuffer(found["train"][0][0], np.uint8).reshape(8, 8)
    assert rows[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # of 255 for 16
    assert found["train"][0][1] == 0


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    want = datasets.load_digits()
    path = sources.digits.importlib.resources.files(sources) / "digits.npz"
    assert path.stat().st_size < 100_000
    with np.load(path) as got:
        np.testing.assert_array_equal(got["images"], want.images)
        np.testing.assert_array_equal(got["labels"], want.target)


def test_npz(npz_file, image_arrays, make_images):
    source = sources.ImageFiles(path=str(npz_file))
    data = assert_holds(make_images(source), *image_arrays)
    assert data.num_classes == 3 and data.image_shape == (5, 6, 3)
    data, _ = stored(make_images(source, labelled=False))
    assert data.classes == ("image",)
    assert not data.rows("train", range(data.num_rows("train")))["labels"].any()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((2, 4, 4), np.uint8)}, "'images'.*did you mean 'image'"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "has no array 'labels'"),
        ({"images": np.zeros((2, 4)), "labels": np.arange(2)}, r"must be \(N, H, W\)"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.arange(2)}, "images are uint8"),
        ({"images": np.array([{}]), "labels": np.arange(1)}, "cannot be read"),
    ],
)
def test_npz_errors(tmp_path, make_images, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        pipeline.prepare(make_images(sources.ImageFiles(path=f"{tmp_path}/bad.npz")))


def test_npz_damaged(npz_file, make_images):
    config = make_images(sources.ImageFiles(path=str(npz_file)))
    content = npz_file.read_bytes()
    middle = content[:900] + b"damage" + content[906:]
    for damaged in (content[:200], b"", b"nothing", middle):
        npz_file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"path=.*cannot be read"):
            pipeline.prepare(config)
    npz_file.unlink()
    with pytest.raises(UserError, match=r"path=.*does not exist"):
        pipeline.prepare(config)


@pytest.fixture
def image_folder(tmp_path, image_arrays):
    """Classes cat, dog and sub/; one below another folder, one in capitals."""
    root = tmp_path / "photos"
    for i, (image, label) in enumerate(zip(*image_arrays, strict=True)):
        name = ["cat/{:02}.png", "dog/deep/{:02}.PNG", "eel/{:02}.png"][label].format(i)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.png").write_bytes(b"")
    (root / "empty").mkdir()
    return root


def test_image_folder(image_folder, image_arrays, make_images):
    images, labels = image_arrays
    order = np.argsort(labels, kind="stable")  # sorted by folder, then by name
    source = sources.ImageFiles(path=str(image_folder))
    data = assert_holds(make_images(source), images[order], labels[order])
    assert data.classes == ("cat", "dog", "eel")


def test_held_out_images_keep_their_side(image_folder, make_images):
    config = make_images(sources.ImageFiles(path=str(image_folder)))
    _, before = stored(config)
    one = np.full((5, 6, 3), 7, np.uint8)
    Image.fromarray(one).save(image_folder / "dog" / "new.png")
    _, after = stored(config)
    for split in documents.SPLITS:
        assert set(before[split]) <= set(after[split])
    assert sum(map(len, after.values())) == 61


def test_changed_file_is_read_again(image_folder, make_images):
    """Also where the size stays: names, sizes and times stand for the content."""
    config = make_images(sources.ImageFiles(path=str(image_folder)))
    path = next(image_folder.glob("cat/*.png"))
    found, sizes = set(), set()
    for second in range(2):
        image = Image.fromarray(np.full((5, 6, 3), second, np.uint8))
        image.save(path, compress_level=0)
        os.utime(path, (second, second))
        sizes.add(path.stat().st_size)
        found |= {pipeline.prepare(config).content_hash for _ in range(2)}
    assert len(sizes) == 1 and len(found) == 2


def test_validation_folder(image_folder, make_images, tmp_path):
    other = tmp_path / "other"
    (other / "eel").mkdir(parents=True)
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(other / "eel" / "a.png")
    source = sources.ImageFiles(path=str(image_folder), validation_path=str(other))
    config = make_images(source, validation_fraction=0.0)
    _, found = stored(config)
    assert len(found["train"]) == 60 and [n for _, n in found["validation"]] == [2]
    (other / "eel").rename(other / "fox")
    with pytest.raises(UserError, match=r"'fox/a.png' is of no class of"):
        pipeline.prepare(config)
    config.data.source.validation_path = str(tmp_path / "x.npz")
    with pytest.raises(UserError, match="both must be folders"):
        pipeline.prepare(config)


def test_numbered_classes_are_in_order_of_numbers(tmp_path, make_images):
    for name in ("0", "2", "10"):
        (tmp_path / "n" / name).mkdir(parents=True)
        image = Image.fromarray(np.full((2, 2), int(name), np.uint8))
        image.save(tmp_path / "n" / name / "a.png")
    source = sources.ImageFiles(path=str(tmp_path / "n"))
    data = pipeline.prepare(make_images(source, validation_fraction=0.0))
    assert data.classes == ("0", "2", "10")


def test_sixteen_bits_and_alpha_are_told(image_folder, make_images, caplog):
    for i in range(2):
        alpha = Image.fromarray(np.zeros((5, 6, 4), np.uint8))
        alpha.save(image_folder / "cat" / f"alpha{i}.png")
    deep = Image.fromarray(np.zeros((5, 6), np.uint16))
    deep.save(image_folder / "dog" / "deep.png")
    source = sources.ImageFiles(path=str(image_folder))
    data = pipeline.prepare(make_images(source, channels=3))
    want = {
        "alpha laid over white": 2,
        "16 bits cut to 8": 1,
        "grey repeated as colour": 1,
    }
    assert data.manifest["conversions"] == want
    assert "alpha laid over white: 2 images" in caplog.text


def save(path, shape):
    Image.fromarray(np.zeros(shape, np.uint8)).save(path)


def test_mixed_sizes(image_folder, make_images):
    save(image_folder / "eel" / "zz.png", (7, 9, 3))
    source = sources.ImageFiles(path=str(image_folder))
    with pytest.raises(UserError) as error:
        pipeline.prepare(make_images(source))
    assert "'eel/zz.png' is 7 x 9 (height x width), and 'cat/" in str(error.value)
    assert "is 5 x 6 (height x width); set --config.data.image_size" in str(error.value)
    assert pipeline.prepare(make_images(source, image_size=4)).image_shape == (4, 4, 3)


def test_grey_and_colour_mixed(image_folder, make_images):
    save(image_folder / "eel" / "zz.png", (5, 6))
    source = sources.ImageFiles(path=str(image_folder))
    with pytest.raises(UserError, match=r"'eel/zz.png' is grey, and 'cat/.*in colour"):
        pipeline.prepare(make_images(source))
    assert pipeline.prepare(make_images(source, channels=1)).image_shape == (5, 6, 1)


def test_corrupt_file(image_folder, make_images, tmp_path):
    path = next(image_folder.glob("eel/*.png"))
    path.write_bytes(path.read_bytes()[:-15])
    source = sources.ImageFiles(path=str(image_folder))
    with pytest.raises(UserError, match=f"image 'eel/{path.name}' cannot be read"):
        pipeline.prepare(make_images(source))
    assert not list((tmp_path / "cache" / "images").glob("*.tmp-*"))


def test_folder_errors(tmp_path, make_images):
    root = tmp_path / "root"
    root.mkdir()
    config = make_images(sources.ImageFiles(path=str(root)))

    def message():
        with pytest.raises(UserError) as error:
            pipeline.prepare(config)
        assert str(root) in str(error.value)
        return str(error.value)

    assert "no file there ends in .png" in message()
    save(root / "a.png", (4, 4))
    assert "there are no classes" in message()
    (root / "cat").mkdir()
    save(root / "cat" / "b.png", (4, 4))
    assert "'a.png' (1 in all) lies in no folder of a class" in message()
    (root / "a.png").unlink()
    assert "all images are of class 'cat'" in message()
    config.data.labelled, config.data.validation_fraction = False, 0.0
    assert pipeline.prepare(config).classes == ("image",)


@pytest.fixture
def latents():
    rng = np.random.default_rng(1)
    return rng.normal(size=(40, 4, 6, 2)).astype(np.float16), np.arange(40) % 4


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_latents(latents, make_images, tmp_path, first, kind):
    z, labels = latents
    given = z.transpose(0, 3, 1, 2) if first else z
    fields = {}
    if kind == "npz":
        np.savez(tmp_path / "z.npz", images=given, labels=labels)
    else:
        np.save(tmp_path / "z.npy", given)
        np.save(tmp_path / "labels.npy", labels)
        fields["labels"] = str(tmp_path / "labels.npy")
    source = sources.Latents(
        images=f"{tmp_path}/z.{kind}",
        scale=0.5,
        shift=0.25,
        channels_first=first,
        **fields,
    )
    config = make_images(source)
    assert not list(config_lib.all_problems(config.data, "config.data", config))
    data, found = stored(config)
    values = (z.astype(np.float32) - np.float32(0.25)) * np.float32(0.5)
    want = [(v.tobytes(), int(n)) for v, n in zip(values, labels, strict=True)]
    assert sorted(found["train"] + found["validation"]) == sorted(want)
    assert found["validation"]
    assert data.manifest["dtype"] == "float16" and data.image_shape == (4, 6, 2)
    source.scale = 1.0  # is no reason to write them again
    assert pipeline.prepare(config).content_hash == data.content_hash
    assert len(list((tmp_path / "cache" / "images").glob("*/manifest.json"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z[0], r"latents are float16 or float32, \(N, H, W, C\)"),
        (lambda z: z.astype(float), "latents are float16 or float32"),
        (lambda z: np.where(z == z[3, 0, 0, 0], np.nan, z), "'train/3' holds values t"),
    ],
)
def test_latents_errors(latents, make_images, tmp_path, change, message):
    z, labels = latents
    np.savez(tmp_path / "z.npz", images=change(z), labels=labels)
    source = sources.Latents(images=f"{tmp_path}/z.npz")
    with pytest.raises(UserError, match=message):
        pipeline.prepare(make_images(source, validation_fraction=0.0))


def test_elements_without_size(tmp_path):
    """Numpy divides by their size where the shape says -1, which ends the process."""
    path = tmp_path / "x.npy"
    with open(path, "wb") as file:
        head = {"descr": "|S0", "fortran_order": False, "shape": (-1,)}
        np.lib.format.write_array_header_1_0(file, head)
        file.write(bytes(9))
    with pytest.raises(UserError, match=r"cannot be read .*\|S0 \(-1,\) by its head"):
        files.array(str(path), "images")


def test_latents_of_npy_is_not_npz(latents, make_images, tmp_path):
    with open(tmp_path / "z.npz", "wb") as file:
        np.save(file, latents[0])
    source = sources.Latents(images=f"{tmp_path}/z.npz")
    with pytest.raises(UserError, match="no npz file; one with"):
        pipeline.prepare(make_images(source))


def test_a_source_of_nothing(make_images, tmp_path):
    np.savez(
        tmp_path / "a.npz", images=np.zeros((0, 4, 4), "u1"), labels=np.zeros(0, int)
    )
    with pytest.raises(UserError, match="there is no image to train on"):
        pipeline.prepare(make_images(sources.ImageFiles(path=f"{tmp_path}/a.npz")))
