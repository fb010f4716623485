"""Any text dataset of TensorFlow Datasets, by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_jax import config as config_lib
from moe_jax.data import documents
from moe_jax.errors import UserError, nearest


@config_lib.node
class TfdsText(config_lib.SourceConfig):
    """A prepared TFDS dataset.

    array_record files are read as they are; tfrecord files need TensorFlow, which
    the extra `tf` installs.

    Attributes:
      name: `dataset/config:version` as TFDS spells it.
      feature: the feature that holds the text.
      train_split: split to train on; TFDS slices such as "train[:1%]" work.
      validation_split: held-out split; "" holds out `data.validation_fraction` of
        the training split's examples, chosen by a hash of their index.
      data_dir: where the dataset was prepared; "" is the default folder of TFDS.
    """

    name: str = "c4/en"
    feature: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"
    data_dir: str = ""

    def problems(self, path, root):
        for name in ("name", "feature", "train_split"):
            if not getattr(self, name):
                yield f"{path}.{name}='': must be set"
        yield from documents.own_split_problems(
            path, "validation_split", self.validation_split, root
        )


def load(
    source: TfdsText, validation_fraction: float, folder: Path
) -> documents.Documents:
    """Opens the dataset; nothing is downloaded.

    Raises:
      UserError: unknown name, feature or split; not prepared; prepared as tfrecord
        and TensorFlow is missing.
    """
    del folder
    builder = open_builder(source)
    _check_feature(source, builder.info)
    train = split_info(source, builder.info, "train_split")

    def read(split):
        if source.validation_split:
            name = getattr(source, f"{split}_split")
            for number, text in enumerate(_texts(builder, name, source.feature)):
                yield f"{name}/{number}", text
            return
        numbers = map(str, range(train.num_examples))
        held_out = documents.held_out(numbers, validation_fraction)
        texts = _texts(builder, source.train_split, source.feature)
        for number, (text, held) in enumerate(zip(texts, held_out, strict=True)):
            if held == (split == "validation"):
                yield f"{source.train_split}/{number}", text

    # Reading all of a large dataset to hash it is too slow; its version and its
    # sizes stand for the content.
    identity = {
        "kind": "tfds_text",
        "name": builder.info.full_name,
        "feature": source.feature,
        "train_split": source.train_split,
        "validation_split": source.validation_split,
        "bytes": {k: int(v.num_bytes) for k, v in sorted(builder.info.splits.items())},
    }
    return documents.Documents(identity, read)


def open_builder(source: Any) -> Any:
    """The prepared dataset; its splits are there, and what reads it is installed.

    Args:
      source: has `name`, `data_dir`, `train_split` and `validation_split`.

    Raises:
      UserError: unknown name or split, not prepared, or TensorFlow is missing.
    """
    import tensorflow_datasets as tfds  # slow to import; a config does not need it

    tfds.disable_progress_bar()
    data_dir = source.data_dir or None
    if data_dir:
        data_dir = str(Path(data_dir).expanduser())
    where = f"data.source.name={source.name!r}"
    try:
        builder = tfds.builder(source.name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        base = source.name.split("/")[0].split(":")[0]
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(
            f"{where}: TFDS knows no such dataset here{nearest(base, known)}; set "
            "data.source.data_dir to the folder it was prepared in (some, such as c4, "
            "TFDS lists only where the packages that prepare them are installed)"
        ) from None
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else error
        raise UserError(
            f"{where}: TFDS cannot open it ({reason}); the name is "
            "dataset/config:version"
        ) from None
    except ImportError as error:
        raise UserError(
            f"{where}: this dataset needs a package that is not installed "
            f"({error}); pip install 'moe_jax[tf]' or install it by name"
        ) from None
    if not builder.is_prepared():
        raise UserError(
            f"{where} is not prepared in {str(builder.data_dir)!r}; run `tfds build "
            f"{source.name} --file_format=array_record` (large datasets take hours), "
            "or set data.source.data_dir to the folder it was prepared in"
        )
    split_info(source, builder.info, "train_split")
    if source.validation_split:
        split_info(source, builder.info, "validation_split")
    if builder.info.file_format.value != "array_record":
        _require_tensorflow(source, builder.info.file_format.value)
    return builder


def _check_feature(source: TfdsText, info: Any) -> None:
    names = sorted(info.features or {})
    if source.feature not in names:
        raise UserError(
            f"data.source.feature={source.feature!r}: {source.name!r} has the features "
            f"{names}{nearest(source.feature, names)}"
        )
    dtype = getattr(info.features[source.feature], "np_dtype", None)
    if dtype not in (str, bytes, object):
        raise UserError(
            f"data.source.feature={source.feature!r} of {source.name!r} is no text "
            f"({info.features[source.feature]}); its features are {names}"
        )


def split_info(source: Any, info: Any, field: str) -> Any:
    """What TFDS knows of the split that a field names.

    Raises:
      UserError: there is no such split.
    """
    name = getattr(source, field)
    try:
        return info.splits[name]
    except (KeyError, ValueError):
        known = sorted(info.splits)
        raise UserError(
            f"data.source.{field}={name!r}: {source.name!r} has the splits "
            f"{known}{nearest(name, known)}"
        ) from None


def _require_tensorflow(source: Any, file_format: str) -> None:
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        raise UserError(
            f"data.source.name={source.name!r} is prepared as {file_format}, which is "
            "read through TensorFlow, and that is not installed: pip install "
            "'moe_jax[tf]', or prepare it with --file_format=array_record"
        ) from None


def _texts(builder: Any, split: str, feature: str) -> Iterator[bytes]:
    if builder.info.file_format.value == "array_record":
        for example in builder.as_data_source(split):
            yield example[feature]
        return
    import tensorflow_datasets as tfds

    for example in tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)):
        yield example[feature]
