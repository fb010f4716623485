"""From a config to batches: the one entry to this folder."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moe_jax import config as config_lib
from moe_jax.data import documents, order, sources, token_file, tokenizers
from moe_jax.data.images import pipeline as images
from moe_jax.data.order import Batch
from moe_jax.data.part import Part
from moe_jax.errors import UserError


def prepare(config: config_lib.Config) -> "TextData | images.ImageData":
    """Makes the files that `config.data` describes, or opens those that are there.

    Any number of processes may call this at once, on one host or on several that
    share `data.folder`.

    Raises:
      UserError: no text, no tokenizer, no space, or less text than one row; or what
        `images.pipeline.prepare` says.
    """
    data = config.data
    if data.kind == "images":
        return images.prepare(data)
    tokenizer = tokenizers.make_tokenizer(data.tokenizer)
    parts = [_part(each, tokenizer) for each in sources.each(data)]
    return TextData(data, tokenizer, parts)


def _part(data: config_lib.DataConfig, tokenizer: tokenizers.Tokenizer) -> Part:
    source = sources.load(data)
    folder = Path(data.folder).expanduser() / "tokens"
    manifest, files = token_file.open_or_build(folder, source, data, tokenizer)
    part = Part(source, manifest, files, data.sequence_length)
    if not part.num_rows("train"):
        tokens = part.tokens_in("train")
        raise UserError(
            f"data.sequence_length={data.sequence_length}: the training text of "
            f"{_name(data.source)} has {tokens} tokens, less than one row; set "
            f"it to at most {tokens} or add text"
        )
    return part


class TextData:
    """Tokenised text of one source, or of several in a mixture, as rows and batches.

    A batch has `tokens`, `targets`, `positions` and `segments`, int32 (b, S), and
    `weights`, float32 (b, S), with b the part of the batch of this process;
    `packing.make_rows` says what they hold. The rows of a mixture are numbered source
    by source.

    Attributes:
      tokenizer: see `tokenizers`.
      parts: one a source.
      content_hash: of all tokens and where documents begin, and of a mixture's weights.
      vocab_size: number of token ids.
      sequence_length: S.
    """

    def __init__(
        self,
        data: config_lib.DataConfig,
        tokenizer: tokenizers.Tokenizer,
        parts: Sequence[Part],
    ):
        self.tokenizer = tokenizer
        self.parts = tuple(parts)
        self.vocab_size = tokenizer.vocab_size
        self.sequence_length = data.sequence_length
        self._names = [_name(each.source) for each in sources.each(data)]
        self._weights = getattr(data.source, "weights", (1,))
        self.content_hash = _content_hash(self.parts, self._weights)

    def describe(self) -> str:
        """How much there is, as a line for people."""
        train, held_out = (self.bytes_in(split) for split in documents.SPLITS)
        line = f"text: {train:,} bytes to train on, {held_out:,} held out"
        if len(self.parts) == 1:
            return line
        total = sum(self._weights)
        shares = (
            f"{weight / total:.1%} {name} ({part.bytes_in('train'):,} bytes)"
            for weight, name, part in zip(
                self._weights, self._names, self.parts, strict=True
            )
        )
        return f"{line}; of the rows {', '.join(shares)}"

    def num_rows(self, split: str) -> int:
        """Rows of the split."""
        return sum(part.num_rows(split) for part in self.parts)

    def source_rows(self, split: str) -> list[tuple[str, int]]:
        """Name and number of rows of each source."""
        pairs = zip(self._names, self.parts, strict=True)
        return [(name, part.num_rows(split)) for name, part in pairs]

    def bytes_in(self, split: str) -> int:
        """Bytes of text that is scored in the split, before tokenising."""
        return sum(part.bytes_in(split) for part in self.parts)

    def tokens_in(self, split: str) -> int:
        """Tokens in the split, with begins and ends of documents."""
        return sum(part.tokens_in(split) for part in self.parts)

    def documents(self, split: str) -> Iterator[bytes]:
        """The text of the split, read from the sources again."""
        return (text for part in self.parts for text in part.documents(split))

    def bytes_per_token(self, split: str) -> float:
        """Of what is scored, with begins and ends of documents; 1 without text.

        Of a mixture's training text: of what is seen of it.
        """
        shares = [1.0] * len(self.parts)
        if split == "train" and len(self.parts) > 1:
            pairs = zip(self._weights, self.parts, strict=True)
            shares = [weight / part.num_rows(split) for weight, part in pairs]
        pairs = list(zip(shares, self.parts, strict=True))
        tokens = sum(share * part.scored_in(split) for share, part in pairs)
        held = sum(share * part.bytes_in(split) for share, part in pairs)
        return held / tokens if tokens else 1.0

    @property
    def all_scored(self) -> bool:
        """Whether every token but the first of a document is to be predicted."""
        return all(part.all_scored for part in self.parts)

    def row(self, split: str, number: int) -> Batch:
        """Row `number` of the split, arrays (S,); past the last it is padding."""
        return {name: value[0] for name, value in self.rows(split, [number]).items()}

    def rows(self, split: str, numbers: Sequence[int]) -> Batch:
        """The same of several rows, arrays (b, S)."""
        found: Batch = {}
        for source, here, own in self._by_source(split, numbers):
            rows = self.parts[source].rows(split, own)
            if len(own) == len(numbers):
                return rows
            for name, value in rows.items():
                shape = (len(numbers), *value.shape[1:])
                found.setdefault(name, np.zeros(shape, value.dtype))[here] = value
        return found

    def identify(self, numbers: Sequence[int]) -> dict[str, list]:
        """What training rows are, for a ledger: one entry a row in each list.

        `source` and `row` count the sources, and the rows of one, from 0; `documents`
        has the first and the last document of the row, by their place in the source's
        training text.
        """
        count = len(numbers)
        found = {name: [None] * count for name in ("source", "row", "documents")}
        for source, here, own in self._by_source("train", numbers):
            spans = self.parts[source].documents_of("train", own).tolist()
            for place, row, span in zip(
                here.tolist(), own.tolist(), spans, strict=True
            ):
                entry = {"source": source, "row": row, "documents": span}
                for name, value in entry.items():
                    found[name][place] = value
        return found

    def _by_source(
        self, split: str, numbers: Sequence[int]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each source that has some: its index, their places and own numbers."""
        numbers = np.asarray(numbers, np.int64)
        sizes = [part.num_rows(split) for part in self.parts]
        first = np.cumsum([0, *sizes[:-1]])
        source_b = np.searchsorted(first, numbers, side="right") - 1
        for source in np.unique(source_b).tolist():
            here = np.flatnonzero(source_b == source)
            yield source, here, numbers[here] - first[source]

    def train_batches(
        self,
        *,
        seed: int,
        batch_size: int,
        start_step: int,
        num_steps: int,
        rows: tuple[int, int] | None = None,
        prefetch: int = 4,
        numbered: bool = False,
    ) -> Iterator[Batch]:
        """Batches of full rows; the arguments are those of `order`."""
        sizes = [part.num_rows("train") for part in self.parts]
        return order.train_batches(
            lambda numbers, place: self.rows("train", numbers),
            order.Stream(sizes, self._weights, seed),
            batch_size=batch_size,
            start_step=start_step,
            num_steps=num_steps,
            rows=rows,
            prefetch=prefetch,
            numbered=numbered,
        )

    def eval_batches(
        self,
        *,
        batch_size: int,
        max_batches: int = 0,
        rows: tuple[int, int] | None = None,
    ) -> Iterator[Batch]:
        """All held-out batches in order of the text; see `order.eval_batches`.

        Those of a mixture take all rows of all sources once, evenly spread.
        """
        spread = order.spread([part.num_rows("validation") for part in self.parts])
        read = lambda numbers: self.rows("validation", numbers)
        return order.eval_batches(
            lambda places: read([spread[i] if i < len(spread) else i for i in places]),
            len(spread),
            batch_size=batch_size,
            max_batches=max_batches,
            rows=rows,
        )


def _name(source: config_lib.SourceConfig) -> str:
    """A source for people: its class, and what it reads."""
    what = getattr(source, "path", "") or getattr(source, "name", "")
    return f"{type(source).__name__}({what})"


def _content_hash(parts: Sequence[Part], weights: Sequence[int]) -> str:
    digest = hashlib.sha256()
    if len(parts) > 1:
        digest.update(repr(tuple(weights)).encode())
    for part in parts:
        for split in documents.SPLITS:
            for entry in part.manifest["splits"][split]["files"].values():
                digest.update(bytes.fromhex(entry["sha256"]))
    return digest.hexdigest()
