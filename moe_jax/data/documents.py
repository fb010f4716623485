"""What a data source gives: documents by split, and which of them are held out."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

SPLITS = ("train", "validation")


class Span(NamedTuple):
    """A part of a document.

    Attributes:
      text: of the part.
      scored: whether its tokens are to be predicted; others are only seen.
      markup: whether the names of special tokens in it stand for these.
    """

    text: bytes
    scored: bool = True
    markup: bool = False


Text = bytes | tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of a source.

    Attributes:
      identity: JSON-ready description; sources with equal identities give equal
        documents, so it keys the token files made from them.
      read: for a split's name, a fresh iterator of (path, text) in a fixed order.
      examples: whether documents are spans, some of them not scored, that belong
        together: rows hold them whole.
    """

    identity: dict[str, Any]
    read: Callable[[str], Iterable[tuple[str, Text]]]
    examples: bool = False

    def split(self, name: str) -> Iterator[tuple[str, Text]]:
        """(path, text) of the split's documents that hold any text.

        Raises:
          ValueError: `name` is not one of `SPLITS`.
        """
        if name not in SPLITS:
            raise ValueError(f"split {name!r}: must be one of {list(SPLITS)}")
        # Empty documents would only add separators, which nobody wants to predict.
        return ((path, text) for path, text in self.read(name) if joined(text))


def joined(text: Text) -> bytes:
    """The text of all spans."""
    return text if isinstance(text, bytes) else b"".join(span.text for span in text)


def held_out(names: Iterable[str], fraction: float) -> np.ndarray:
    """Which documents belong to validation, by a hash of their names.

    A document keeps its side when others are added or removed. With a fraction above
    zero and at least two documents neither side is empty: the document with the
    least hash is held out, the one with the greatest is trained on.

    Args:
      names: one name a document.
      fraction: expected share of documents held out.

    Returns:
      bool (number of names,).
    """
    places = np.fromiter((_place(name) for name in names), np.float64)
    chosen = places < fraction
    if fraction > 0 and len(places) > 1:
        chosen[np.argmin(places)] = True
        chosen[np.argmax(places)] = False
    return chosen


def own_split_problems(path: str, field: str, value: str, root: Any) -> Iterator[str]:
    """The rule of a source that may name a validation split of its own.

    Args:
      path: of the source in the config.
      field: of the source, that names the split.
      value: of the field; "" where the source has none.
      root: the whole config.
    """
    fraction = root.data.validation_fraction
    if value and fraction:
        yield (
            f"{path.partition('.source')[0]}.validation_fraction={fraction}: must be 0 "
            f"where {path}.{field}={value!r} names what is held out; set it to 0, or "
            f"{field} to ''"
        )


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def cut_before(text: bytes, at: int, least: int) -> int:
    """Where to cut `text`: after the last newline in [least, at), else near `at`.

    A cut without newline leaves UTF-8 characters whole.
    """
    newline = text.rfind(b"\n", least, at)
    if newline >= 0:
        return newline + 1
    for position in range(at, max(least, at - 3) - 1, -1):
        if position < len(text) and text[position] & 0xC0 != 0x80:
            return position
    return at  # not UTF-8, so that any cut will do
