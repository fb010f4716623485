"""The data sources: one file each, chosen by the class of `config.data.source`."""

import dataclasses
from pathlib import Path

from moe_jax import config as config_lib
from moe_jax.data import documents
from moe_jax.data.sources import instructions, python_source, text_files, tfds_text
from moe_jax.data.sources.instructions import Instructions
from moe_jax.data.sources.mixture import Mixture
from moe_jax.data.sources.python_source import PythonSource
from moe_jax.data.sources.text_files import TextFiles
from moe_jax.data.sources.tfds_text import TfdsText

__all__ = [
    "SOURCES",
    "Instructions",
    "Mixture",
    "PythonSource",
    "TextFiles",
    "TfdsText",
    "each",
    "load",
]

# Each takes (source config, validation_fraction, cache folder).
SOURCES = {
    PythonSource: python_source.load,
    TextFiles: text_files.load,
    Instructions: instructions.load,
    TfdsText: tfds_text.load,
}


def each(data: config_lib.DataConfig) -> list[config_lib.DataConfig]:
    """The config of each source alone: of a mixture several, else the given one."""
    if not isinstance(data.source, Mixture):
        return [data]
    return [dataclasses.replace(data, source=source) for source in data.source.sources]


def load(data: config_lib.DataConfig) -> documents.Documents:
    """The documents that the config names; its source is no mixture (`each`).

    Raises:
      UserError: they are not there or cannot be read.
    """
    folder = Path(data.folder).expanduser()
    return SOURCES[type(data.source)](data.source, data.validation_fraction, folder)
