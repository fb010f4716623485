"""The user's own text: a file, a folder or a glob."""

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from moe_jax import config as config_lib
from moe_jax.data import documents
from moe_jax.errors import UserError

_NEWLINE_WITHIN = 4096


@config_lib.node
class TextFiles(config_lib.SourceConfig):
    """Files, each one document.

    Where there is only one, its end is held out; otherwise whole documents are.

    Attributes:
      path: a file, a folder (all files below it but hidden ones) or a glob, where
        `**` matches any number of folders.
    """

    path: str = ""

    def problems(self, path, root):
        if not self.path:
            yield f"{path}.path='': must name a file, a folder or a glob"


def load(
    source: TextFiles, validation_fraction: float, folder: Path
) -> documents.Documents:
    """Finds the files and hashes what they hold.

    Raises:
      UserError: nothing is there, nothing can be read, or all of it is empty.
    """
    del folder
    files = find(source)
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}\0{path.stat().st_size}\0".encode("utf-8", "replace"))
        digest.update(file_digest(path, source))
    # Empty files are no documents: beside them a single file is still the only one.
    files = [(name, path) for name, path in files if path.stat().st_size]
    if not files:
        raise UserError(
            f"data.source.path={source.path!r}: every file there is empty; training "
            "needs text"
        )

    def read(split):
        if len(files) == 1:
            name, path = files[0]
            return [(name, _part(path.read_bytes(), validation_fraction, split))]
        return _whole_files(files, validation_fraction, split)

    identity = {"kind": "text_files", "sha256": digest.hexdigest()}
    return documents.Documents(identity, read)


def find(source: config_lib.SourceConfig) -> list[tuple[str, Path]]:
    """(name, path) of all files; names do not depend on where the folder lies.

    Args:
      source: has a `path`: a file, a folder or a glob.

    Raises:
      UserError: there is no file.
    """
    root = Path(source.path).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if root.is_dir():
        found = [(p.relative_to(root).as_posix(), p) for p in files_below(root)]
        if not found:
            raise UserError(
                f"data.source.path={source.path!r}: the folder holds no files "
                "(hidden ones do not count); put text into it"
            )
        return sorted(found)
    if glob.has_magic(source.path):
        matches = glob.glob(str(root), recursive=True)
        found = sorted((path, Path(path)) for path in matches if os.path.isfile(path))
        if not found:
            raise UserError(
                f"data.source.path={source.path!r}: the glob matches no file, seen "
                f"from {os.getcwd()!r}; quote it in a shell and use ** for subfolders"
            )
        return found
    raise UserError(
        f"data.source.path={source.path!r} does not exist, seen from {os.getcwd()!r}; "
        "give a file, a folder or a glob"
    )


def files_below(root: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones and those in hidden folders.

    Raises:
      UserError: one is a link that leads out of the folder.
    """
    inside = os.path.realpath(root) + os.sep
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not path.is_file():
                continue
            if path.is_symlink() and not os.path.realpath(path).startswith(inside):
                raise UserError(
                    f"data.source: {str(path)!r} is a link that leads out of the "
                    f"folder, to {os.path.realpath(path)!r}; put a copy there if it "
                    "belongs to the data (a glob takes links as they are)"
                )
            yield path


def file_digest(path: Path, source: config_lib.SourceConfig) -> bytes:
    """The SHA-256 of a file of the source.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(
            f"data.source.path={source.path!r}: cannot read {str(path)!r} "
            f"({error.strerror}); mend its permissions or leave it out"
        ) from None


def _whole_files(files, fraction: float, split: str) -> Iterator[tuple[str, bytes]]:
    held_out = documents.held_out((name for name, _ in files), fraction)
    for (name, path), held in zip(files, held_out, strict=True):
        if held == (split == "validation"):
            yield name, path.read_bytes()


def _part(text: bytes, fraction: float, split: str) -> bytes:
    """The head (train) or the end (validation) of the only document."""
    cut = len(text) - round(len(text) * fraction)
    if cut < len(text):
        cut = documents.cut_before(text, cut, max(0, cut - _NEWLINE_WITHIN))
    return text[:cut] if split == "train" else text[cut:]
