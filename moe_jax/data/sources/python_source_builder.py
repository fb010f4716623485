"""The TFDS builder of `PythonSource`; needs no TensorFlow.

It is apart from the config class because importing TFDS takes time.
"""

import contextlib
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from moe_jax.data import documents
from moe_jax.data.sources import python_source


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """Standard library modules as examples `{"path", "text"}`."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. Without this TFDS looks for a file of checksums beside
    # the code, by way of a package (importlib_resources) that it does not declare.
    url_infos: ClassVar[dict] = {}

    def __init__(self, *, validation_fraction: float = 0.05, **kwargs):
        self._validation_fraction = validation_fraction
        # array_record is read without TensorFlow; tfrecord is not.
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source of Python's standard library, tests left out.",
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            # The order within a split is the order of generation.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager
        examples = list(python_source.stdlib_documents())
        held_out = documents.held_out(
            (path for path, _ in examples), self._validation_fraction
        )
        pairs = list(zip(examples, held_out, strict=True))
        parts = {
            "train": [example for example, held in pairs if not held],
            "validation": [example for example, held in pairs if held],
        }
        # TFDS writes no empty split.
        return {k: self._generate_examples(v) for k, v in parts.items() if v}

    def _generate_examples(self, examples) -> Iterator[tuple[int, dict]]:
        for number, (path, text) in enumerate(examples):
            yield number, {"path": path, "text": text}


def prepared(folder: Path, validation_fraction: float, split: str) -> Sequence[dict]:
    """Examples of one split, after preparing the dataset where it is missing."""
    tfds.disable_progress_bar()
    builder = PythonSource(data_dir=folder, validation_fraction=validation_fraction)
    # The caller holds the lock, so that these are of a process that died.
    for leftover in folder.glob("*/incomplete.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # TFDS prints that it downloads, which it does not here.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return builder.as_data_source(split) if split in builder.info.splits else []
