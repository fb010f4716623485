"""From a config to batches: the one entry to this folder."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_jax import config as config_lib
from moe_jax.data import documents, order, packing, sources, token_file, tokenizers
from moe_jax.data.images import pipeline as images
from moe_jax.data.order import Batch
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
    source = sources.load(data)
    folder = Path(data.folder).expanduser() / "tokens"
    manifest, files = token_file.open_or_build(folder, source, data, tokenizer)
    return TextData(source, tokenizer, manifest, files, data.sequence_length)


class TextData:
    """Tokenised text as rows and batches.

    A batch has `tokens`, `targets`, `positions` and `segments`, int32 (b, S), and
    `weights`, float32 (b, S), with b the part of the batch of this process;
    `packing.make_rows` says what they hold.

    Attributes:
      tokenizer: see `tokenizers`.
      manifest: what the token files hold, JSON-ready.
      content_hash: of all tokens and where documents begin.
      vocab_size: number of token ids.
      sequence_length: S.
    """

    def __init__(
        self,
        source: documents.Documents,
        tokenizer: tokenizers.Tokenizer,
        manifest: dict[str, Any],
        files: dict[str, token_file.TokenFile],
        sequence_length: int,
    ):
        self.tokenizer = tokenizer
        self.manifest = manifest
        self.content_hash = _content_hash(manifest)
        self.vocab_size = tokenizer.vocab_size
        self.sequence_length = sequence_length
        self._source = source
        self._files = files
        self._begins = {
            split: packing.whole_rows(file.offsets, sequence_length)
            for split, file in files.items()
            if file.scored is not None
        }
        num_tokens = self.tokens_in("train")
        if not self.num_rows("train"):
            raise UserError(
                f"data.sequence_length={sequence_length}: the training text has "
                f"{num_tokens} tokens, less than one row; set it to at most "
                f"{num_tokens} or add text"
            )

    def describe(self) -> str:
        """How much there is, as a line for people."""
        train, held_out = (self.bytes_in(split) for split in documents.SPLITS)
        return f"text: {train:,} bytes to train on, {held_out:,} held out"

    def num_rows(self, split: str) -> int:
        """Rows of the split.

        Of a text that is cut every S tokens the last, partial one counts for
        validation only.
        """
        if split in self._begins:
            return len(self._begins[split]) - 1
        count = packing.num_full_rows if split == "train" else packing.num_rows
        return count(self.tokens_in(split), self.sequence_length)

    def bytes_in(self, split: str) -> int:
        """Bytes of text that is scored in the split, before tokenising."""
        return self.manifest["splits"][split]["bytes"]

    def tokens_in(self, split: str) -> int:
        """Tokens in the split, with begins and ends of documents."""
        return self.manifest["splits"][split]["tokens"]

    def documents(self, split: str) -> Iterator[bytes]:
        """The text of the split, read from the source again."""
        return (documents.joined(text) for _, text in self._source.split(split))

    def bytes_per_token(self, split: str) -> float:
        """Of what is scored, with begins and ends of documents; 1 without text."""
        entry = self.manifest["splits"][split]
        tokens = entry.get("scored", entry["tokens"])
        return entry["bytes"] / tokens if tokens else 1.0

    @property
    def all_scored(self) -> bool:
        """Whether every token but the first of a document is to be predicted."""
        return not self._source.examples

    def row(self, split: str, number: int) -> Batch:
        """Row `number` of the split, arrays (S,); past the last it is padding."""
        return {name: value[0] for name, value in self.rows(split, [number]).items()}

    def rows(self, split: str, numbers: Sequence[int]) -> Batch:
        """The same of several rows, arrays (b, S)."""
        files = self._files[split]
        return packing.make_rows(
            files.tokens,
            files.offsets,
            numbers,
            self.sequence_length,
            self._begins.get(split),
            files.scored,
        )

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
        rows: tuple[int, int] | None = None,
        prefetch: int = 4,
    ) -> Iterator[Batch]:
        """Batches of full rows; the arguments are those of `order.train_batches`."""
        return order.train_batches(
            lambda numbers, place: self.rows("train", numbers),
            self.num_rows("train"),
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            num_steps=num_steps,
            rows=rows,
            prefetch=prefetch,
        )

    def eval_batches(
        self,
        *,
        batch_size: int,
        max_batches: int = 0,
        rows: tuple[int, int] | None = None,
    ) -> Iterator[Batch]:
        """Held-out batches in order of the text; see `order.eval_batches`."""
        return order.eval_batches(
            lambda numbers: self.rows("validation", numbers),
            self.num_rows("validation"),
            batch_size=batch_size,
            max_batches=max_batches,
            rows=rows,
        )


def _content_hash(manifest: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for split in documents.SPLITS:
        for entry in manifest["splits"][split]["files"].values():
            digest.update(bytes.fromhex(entry["sha256"]))
    return digest.hexdigest()
