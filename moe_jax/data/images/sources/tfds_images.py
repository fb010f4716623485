"""Any image dataset of TensorFlow Datasets, by name."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_jax import config as config_lib
from moe_jax.data import documents
from moe_jax.data.images import examples
from moe_jax.data.sources import tfds_text
from moe_jax.errors import UserError, nearest


@config_lib.node
class TfdsImages(config_lib.ImageSourceConfig):
    """A prepared TFDS dataset, such as mnist, fashion_mnist, cifar10 or imagenet2012.

    array_record files are read as they are; tfrecord files need TensorFlow, which the
    extra `tf` installs.

    Attributes:
      name: `dataset/config:version` as TFDS spells it.
      feature: the feature that holds the image.
      label: the feature that holds the class; "" where `data.labelled` is False.
      train_split: split to train on; TFDS slices such as "train[:1%]" work.
      validation_split: held-out split, such as "test"; "" holds out
        `data.validation_fraction` of the training split, chosen by a hash of the index.
      data_dir: where the dataset was prepared; "" is the default folder of TFDS.
    """

    name: str = "mnist"
    feature: str = "image"
    label: str = "label"
    train_split: str = "train"
    validation_split: str = ""
    data_dir: str = ""

    def problems(self, path, root):
        for name in ("name", "feature", "train_split"):
            if not getattr(self, name):
                yield f"{path}.{name}='': must be set"
        if not self.label and getattr(root.data, "labelled", True):
            yield f"{path}.label='': must be set; {examples.NO_CLASSES}"
        yield from documents.own_split_problems(
            path, "validation_split", self.validation_split, root
        )


def load(source: TfdsImages, data: config_lib.BaseDataConfig) -> examples.Images:
    """Opens the dataset; nothing is downloaded.

    Raises:
      UserError: unknown name, feature or split; not prepared; no images or classes; a
        package is missing.
    """
    builder = tfds_text.open_builder(source)
    _check_image(source, builder.info)
    classes = _classes(source, builder.info) if data.labelled else ("image",)
    train = tfds_text.split_info(source, builder.info, "train_split")

    def read(split: str) -> Iterator[examples.Example]:
        if source.validation_split:
            name = getattr(source, f"{split}_split")
            yield from _examples(builder, source, name, None, data.labelled)
            return
        numbers = map(str, range(train.num_examples))
        held_out = documents.held_out(numbers, data.validation_fraction)
        chosen = held_out == (split == "validation")
        yield from _examples(builder, source, source.train_split, chosen, data.labelled)

    # Reading all of a large dataset to hash it is too slow; its version and its sizes
    # stand for the content.
    identity = {
        "kind": "tfds_images",
        "name": builder.info.full_name,
        "feature": source.feature,
        "label": source.label,
        "train_split": source.train_split,
        "validation_split": source.validation_split,
        "bytes": {k: int(v.num_bytes) for k, v in sorted(builder.info.splits.items())},
    }
    return examples.Images(identity, classes, read)


def _check_image(source: TfdsImages, info: Any) -> None:
    import tensorflow_datasets as tfds

    feature = _feature(source, info, "feature")
    if not isinstance(feature, tfds.features.Image):
        raise UserError(
            f"data.source.feature={source.feature!r} of {source.name!r} is no image "
            f"({feature}); its features are {sorted(info.features)}"
        )
    if np.dtype(feature.np_dtype) not in (np.uint8, np.uint16):
        raise UserError(
            f"data.source.feature={source.feature!r} of {source.name!r} holds pixels "
            f"of {feature.np_dtype}; uint8 and uint16 can be read"
        )


def _classes(source: TfdsImages, info: Any) -> tuple[str, ...]:
    import tensorflow_datasets as tfds

    feature = _feature(source, info, "label")
    if not isinstance(feature, tfds.features.ClassLabel):
        raise UserError(
            f"data.source.label={source.label!r} of {source.name!r} is no ClassLabel "
            f"({feature}); {examples.NO_CLASSES}"
        )
    # Names alone are known for some datasets, and only their number for others.
    names = tuple(feature.names or map(str, range(feature.num_classes or 0)))
    if len(names) == 1:
        raise examples.one_class_error(f"data.source.name={source.name!r}", names[0])
    if not names:
        raise UserError(
            f"data.source.label={source.label!r} of {source.name!r} has no classes; "
            f"{examples.NO_CLASSES}"
        )
    return names


def _feature(source: TfdsImages, info: Any, field: str) -> Any:
    name, names = getattr(source, field), sorted(info.features or {})
    if name not in names:
        raise UserError(
            f"data.source.{field}={name!r}: {source.name!r} has the features "
            f"{names}{nearest(name, names)}"
        )
    return info.features[name]


def _examples(
    builder: Any, source: TfdsImages, split: str, chosen: Any, labelled: bool
) -> Iterator[examples.Example]:
    import tensorflow_datasets as tfds

    # The bytes of the file; `pixels` decodes them, as it does those of all sources.
    raw = {source.feature: tfds.decode.SkipDecoding()}
    label = source.label if labelled else ""
    if builder.info.file_format.value == "array_record":
        found = builder.as_data_source(split, decoders=raw)
        for i in range(len(found)):
            if chosen is None or chosen[i]:
                get = functools.partial(found.__getitem__, i)
                load = functools.partial(_load, get, source.feature, label)
                yield examples.Example(f"{split}/{i}", load)
        return
    dataset = builder.as_dataset(split=split, shuffle_files=False, decoders=raw)
    for i, example in enumerate(tfds.as_numpy(dataset)):
        if chosen is None or chosen[i]:
            get = functools.partial(dict, example)
            load = functools.partial(_load, get, source.feature, label)
            yield examples.Example(f"{split}/{i}", load)


def _load(get: Any, feature: str, label: str) -> tuple[bytes, int]:
    example = get()
    return bytes(example[feature]), int(example[label]) if label else 0
