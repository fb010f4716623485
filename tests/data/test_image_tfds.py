"""Images of TFDS: splits, labels, and what is said where they are missing."""

import dataclasses
import importlib.util
import io
import json
import sys

import pytest
from PIL import Image
from stored_images import assert_holds, expected, stored

from moe_jax import config as config_lib
from moe_jax.data import pipeline
from moe_jax.data.images import pixels, sources
from moe_jax.errors import UserError

_BUILDER = """
import io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class TinyImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(
                    shape=(None, None, 3), encoding_format="png"
                ),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
                "number": tfds.features.Scalar(np.int64),
            }),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(0, 50),
            "test": self._generate_examples(50, 60),
        }

    def _generate_examples(self, begin, end):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (60, 5, 6, 3), dtype=np.uint8)
        labels = rng.permutation(np.arange(60) % 3)
        for i in range(begin, end):
            file = io.BytesIO()
            Image.fromarray(images[i]).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": int(labels[i]), "number": i}
"""


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """`tiny_images` as array_record, the images of `image_arrays`, without its code."""
    root = tmp_path_factory.mktemp("tfds")
    (root / "tiny_builder.py").write_text(_BUILDER)
    spec = importlib.util.spec_from_file_location(
        "tiny_builder", root / "tiny_builder.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_builder"] = module  # TFDS asks for the module of a builder
    spec.loader.exec_module(module)
    builder = module.TinyImages(data_dir=root / "data", file_format="array_record")
    builder.download_and_prepare()
    del sys.modules["tiny_builder"]
    return root / "data"


@pytest.fixture
def tfds_source(tfds_folder):
    return sources.TfdsImages(name="tiny_images", data_dir=str(tfds_folder))


def test_tfds_holds_out_of_training_split(tfds_source, image_arrays, make_images):
    images, labels = image_arrays
    data = assert_holds(make_images(tfds_source), images[:50], labels[:50])
    assert data.classes == ("a", "b", "c")
    assert "tensorflow" not in sys.modules


def test_tfds_with_a_split_of_its_own(tfds_source, image_arrays, make_images):
    images, labels = image_arrays
    source = dataclasses.replace(tfds_source, validation_split="test")
    _, found = stored(make_images(source, validation_fraction=0.0))
    assert found["train"] == expected(images[:50], labels[:50])
    assert found["validation"] == expected(images[50:], labels[50:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "no_images"}, "no such dataset"),
        ({"name": "cifar10"}, "not prepared .*tfds build cifar10"),
        ({"feature": "imag"}, "did you mean 'image'"),
        ({"feature": "number"}, "is no image"),
        ({"label": "lable"}, "did you mean 'label'"),
        ({"label": "number"}, "is no ClassLabel.*labelled=False"),
        ({"train_split": "trian"}, "did you mean 'train'"),
        ({"validation_split": "valid"}, r"has the splits \['test', 'train'\]"),
    ],
)
def test_tfds_errors(tfds_source, make_images, fields, message):
    source = dataclasses.replace(tfds_source, **fields)
    with pytest.raises(UserError, match=message):
        pipeline.prepare(make_images(source))


def test_tfds_tfrecord_needs_tensorflow(
    tfds_folder, make_images, tmp_path, monkeypatch
):
    folder = tmp_path / "copy" / "tiny_images" / "1.0.0"
    folder.mkdir(parents=True)
    for path in (tfds_folder / "tiny_images" / "1.0.0").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    info = folder / "dataset_info.json"
    content = json.loads(info.read_text()) | {"fileFormat": "tfrecord"}
    info.write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    source = sources.TfdsImages(name="tiny_images", data_dir=str(tmp_path / "copy"))
    with pytest.raises(UserError, match=r"pip install 'moe_jax\[tf\]'"):
        pipeline.prepare(make_images(source))


def test_unlabelled_tfds_needs_no_label(tfds_source, make_images):
    source = dataclasses.replace(tfds_source, label="")
    config = make_images(source, labelled=False)
    assert not list(config_lib.all_problems(config.data, "config.data", config))
    assert pipeline.prepare(config).num_classes == 1


def test_png_bytes_are_what_is_read(tfds_source, make_images, monkeypatch):
    """Decoding is left to `pixels`, whatever else is installed."""
    seen = []
    decode = pixels.decode

    def spied(content, name):
        seen.append(Image.open(io.BytesIO(content)).format)
        return decode(content, name)

    monkeypatch.setattr(pixels, "decode", spied)
    pipeline.prepare(make_images(tfds_source))
    assert seen == ["PNG"] * 50
