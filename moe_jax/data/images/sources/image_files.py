"""The user's own images: a folder per class of PNG or JPEG files, or one npz file."""

import functools
from collections.abc import Iterator
from pathlib import Path

from moe_jax import config as config_lib
from moe_jax.data import documents
from moe_jax.data.images import examples
from moe_jax.data.images.sources import files
from moe_jax.data.sources import text_files
from moe_jax.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg")
_FIELDS = {"train": "path", "validation": "validation_path"}


@config_lib.node
class ImageFiles(config_lib.ImageSourceConfig):
    """Images in files: a folder of PNG and JPEG files, or one npz file.

    Of a folder each subfolder is a class: in order of their numbers where all names are
    numbers, otherwise of their names; one without images is none. An npz file holds
    `images`, uint8 or uint16, (N, H, W) or (N, H, W, C), and `labels`, whole numbers
    from 0. Hidden files and folders do not count.

    Attributes:
      path: a folder, or an npz file.
      validation_path: the same for images that are held out; "" holds out
        `data.validation_fraction` of the others, chosen by a hash of their names.
    """

    path: str = ""
    validation_path: str = ""

    def problems(self, path, root):
        if not self.path:
            yield f"{path}.path='': must name a folder or an npz file"
        yield from documents.own_split_problems(
            path, "validation_path", self.validation_path, root
        )


def load(source: ImageFiles, data: config_lib.BaseDataConfig) -> examples.Images:
    """Finds the images.

    Raises:
      UserError: nothing is there, or there are no two classes.
    """
    given = {split: getattr(source, field) for split, field in _FIELDS.items()}
    given = {split: path for split, path in given.items() if path}
    folders = [Path(path).expanduser().is_dir() for path in given.values()]
    if not any(folders):
        return _npz(given, data)
    if not all(folders):
        raise UserError(
            f"data.source.path={source.path!r} and validation_path="
            f"{source.validation_path!r}: both must be folders, or both npz files"
        )
    return _folders(given, data)


def _npz(given: dict[str, str], data: config_lib.BaseDataConfig) -> examples.Images:
    names = ["images", "labels"] if data.labelled else ["images"]
    parts, identity = {}, {"kind": "npz"}
    for split, path in given.items():
        field = _FIELDS[split]
        if not Path(path).expanduser().exists():
            raise files.unreadable(path, field, "it does not exist")
        images, labels = [*files.arrays(path, field, names), None][:2]
        if images.ndim not in (3, 4):
            raise UserError(
                f"data.source.{field}={path!r}: images are {images.shape}; they must "
                "be (N, H, W) or (N, H, W, C)"
            )
        parts[split] = images, labels
        identity[field] = files.digest(path, field)
    where = f"data.source.path={given['train']!r}"
    return examples.of_arrays(identity, parts, data, where)


def _folders(given: dict[str, str], data: config_lib.BaseDataConfig) -> examples.Images:
    found = {split: _find(path, _FIELDS[split]) for split, path in given.items()}
    classes = ("image",)
    if data.labelled:
        classes = _classes(found["train"], given["train"])
        for name, _ in found.get("validation", []):
            if _folder_of(name) not in classes:
                raise UserError(
                    f"data.source.validation_path={given['validation']!r}: {name!r} is "
                    f"of no class of data.source.path={given['train']!r}"
                )
    numbers = {name: number for number, name in enumerate(classes)}

    def read(split: str) -> Iterator[examples.Example]:
        pairs = found.get(split, found["train"])
        chosen = [True] * len(pairs)
        if len(found) == 1:
            names = (name for name, _ in pairs)
            held_out = documents.held_out(names, data.validation_fraction)
            chosen = held_out == (split == "validation")
        for (name, path), there in zip(pairs, chosen, strict=True):
            if there:
                label = numbers[_folder_of(name)] if data.labelled else 0
                yield examples.Example(name, functools.partial(_load, path, label))

    # Reading all files each time would take too long: a file that was not written
    # since holds what it held.
    identity = {
        "kind": "image_files",
        "files": {split: _fingerprints(pairs) for split, pairs in found.items()},
    }
    return examples.Images(identity, classes, read)


def _find(path: str, field: str) -> list[tuple[str, Path]]:
    """(name, path) of all images below a folder, sorted."""
    root = Path(path).expanduser()
    below = sorted(
        (file.relative_to(root).as_posix(), file)
        for file in text_files.files_below(root)
        if file.suffix.lower() in _SUFFIXES
    )
    if not below:
        raise UserError(
            f"data.source.{field}={path!r}: no file there ends in "
            f"{', '.join(_SUFFIXES)}; name a folder of such images"
        )
    return below


def _folder_of(name: str) -> str:
    folder, _, rest = name.partition("/")
    return folder if rest else ""


def _classes(pairs: list[tuple[str, Path]], path: str) -> tuple[str, ...]:
    where = f"data.source.path={path!r}"
    loose = [name for name, _ in pairs if not _folder_of(name)]
    names = sorted({_folder_of(name) for name, _ in pairs} - {""})
    if not names:
        raise UserError(
            f"{where}: there are no classes; put the images of each class into a "
            f"folder of its own. {examples.NO_CLASSES}"
        )
    if loose:
        raise UserError(
            f"{where}: {loose[0]!r} ({len(loose)} in all) lies in no folder of a "
            f"class; move it into one. {examples.NO_CLASSES}"
        )
    if len(names) == 1:
        raise examples.one_class_error(where, names[0])
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    return tuple(names)


def _load(path: Path, label: int) -> tuple[bytes, int]:
    try:
        return path.read_bytes(), label
    except OSError as error:
        raise files.unreadable(str(path), "path", error.strerror) from None


def _fingerprints(pairs: list[tuple[str, Path]]) -> list[list]:
    found = []
    for name, path in pairs:
        status = path.stat()
        found.append([name, status.st_size, status.st_mtime_ns])
    return found
