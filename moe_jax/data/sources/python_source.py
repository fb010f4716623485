"""The standard library of the running interpreter: text that is there offline."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moe_jax import config as config_lib
from moe_jax.data import documents, folders
from moe_jax.errors import UserError

_LEFT_OUT = {"test", "tests", "idlelib", "idle_test"}
_LEFT_OUT |= {"site-packages", "dist-packages", "__pycache__"}


@config_lib.node
class PythonSource(config_lib.SourceConfig):
    """The `.py` files of Python's standard library without its tests.

    The text differs between interpreters, and so do the losses.
    """


def stdlib_documents() -> Iterator[tuple[str, bytes]]:
    """(relative path, text) of every document, in order of the path.

    Raises:
      UserError: this interpreter comes without its library's source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_python_files(root), key=lambda path: path.relative_to(root).parts)
    if not paths:
        raise UserError(
            f"data.source=PythonSource(): no .py files below {str(root)!r}, the "
            "standard library of this interpreter; use an interpreter that comes "
            "with them, or TextFiles(path=...)"
        )
    for path in paths:
        yield path.relative_to(root).as_posix(), path.read_bytes()


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        for name in names:
            path = Path(folder, name)
            is_test = name.startswith("test_")
            if name.endswith(".py") and not is_test and path.is_file():
                yield path


def _digest() -> str:
    digest = hashlib.sha256()
    for path, text in stdlib_documents():
        digest.update(f"{path}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()


def load(
    source: PythonSource, validation_fraction: float, folder: Path
) -> documents.Documents:
    """Prepares the TFDS dataset `python_source` once and reads it.

    Its folder is named after the interpreter's version, the fraction and the text, so
    that two interpreters that share a cache do not mix.
    """
    del source
    digest = _digest()
    version = platform.python_version()
    name = f"python-{version}-{validation_fraction:g}-{digest[:12]}"

    def read(split):
        # TFDS takes a third of a second to import; a config does not need it.
        from moe_jax.data.sources import python_source_builder

        with folders.exclusive(folder / "tfds" / f"{name}.lock"):
            dataset = python_source_builder.prepared(
                folder / "tfds" / name, validation_fraction, split
            )
        for example in dataset:
            yield example["path"].decode(), example["text"]

    identity = {"kind": "python_source", "python": version, "sha256": digest}
    return documents.Documents(identity, read)
