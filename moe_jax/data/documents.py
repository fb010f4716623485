"""What a data source gives: documents by split, and which of them are held out."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of a source.

    Attributes:
      identity: JSON-ready description; sources with equal identities give equal
        documents, so it keys the token files made from them.
      read: for a split's name, a fresh iterator of (path, text) in a fixed order.
    """

    identity: dict[str, Any]
    read: Callable[[str], Iterable[tuple[str, bytes]]]

    def split(self, name: str) -> Iterator[tuple[str, bytes]]:
        """(path, text) of the split's documents that hold any text.

        Raises:
          ValueError: `name` is not one of `SPLITS`.
        """
        if name not in SPLITS:
            raise ValueError(f"split {name!r}: must be one of {list(SPLITS)}")
        # Empty documents would only add separators, which nobody wants to predict.
        return ((path, text) for path, text in self.read(name) if text)


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
