"""The rows of one source of text."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moe_jax.data import documents, packing, token_file
from moe_jax.data.order import Batch


class Part:
    """A source's token files, cut into rows.

    Args:
      source: the documents.
      manifest: what the token files hold.
      files: the token files by split.
      sequence_length: S.

    Attributes:
      manifest: see above; JSON-ready.
      all_scored: whether every token but the first of a document is to be predicted.
    """

    def __init__(
        self,
        source: documents.Documents,
        manifest: dict[str, Any],
        files: dict[str, token_file.TokenFile],
        sequence_length: int,
    ):
        self.manifest = manifest
        self.all_scored = not source.examples
        self._source, self._files = source, files
        self._length = sequence_length
        self._begins = {
            split: packing.whole_rows(file.offsets, sequence_length)
            for split, file in files.items()
            if file.scored is not None
        }

    def num_rows(self, split: str) -> int:
        """Rows of the split.

        Of a text that is cut every S tokens the last, partial one counts for
        validation only.
        """
        if split in self._begins:
            return len(self._begins[split]) - 1
        count = packing.num_full_rows if split == "train" else packing.num_rows
        return count(self.tokens_in(split), self._length)

    def bytes_in(self, split: str) -> int:
        """Bytes of text that is scored in the split, before tokenising."""
        return self.manifest["splits"][split]["bytes"]

    def tokens_in(self, split: str) -> int:
        """Tokens in the split, with begins and ends of documents."""
        return self.manifest["splits"][split]["tokens"]

    def scored_in(self, split: str) -> int:
        """Those of them that are scored, begins and ends of documents included."""
        return self.manifest["splits"][split].get("scored", self.tokens_in(split))

    def documents(self, split: str) -> Iterator[bytes]:
        """The text of the split, read from the source again."""
        return (documents.joined(text) for _, text in self._source.split(split))

    def rows(self, split: str, numbers: Sequence[int]) -> Batch:
        """Rows of these numbers, arrays (b, S); past the last they are padding."""
        file = self._files[split]
        return packing.make_rows(
            file.tokens,
            file.offsets,
            numbers,
            self._length,
            self._begins.get(split),
            file.scored,
        )

    def documents_of(self, split: str, numbers: Sequence[int]) -> np.ndarray:
        """The first and the last document of each row, (b, 2), from 0."""
        return packing.documents_of(
            self._files[split].offsets, numbers, self._length, self._begins.get(split)
        )
