"""Flat files of tokens, made once for a source and a tokenizer.

A folder (`prepared`) holds for each split the joined documents and where each begins.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import config as config_lib
from moe_jax.data import documents, npy, prepared, tokenizers, workers
from moe_jax.data.prepared import DamagedError
from moe_jax.errors import UserError

FORMAT_VERSION = 1
_CHUNK_BYTES = 4 << 20
_PIECE_BYTES = 16 << 20
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """One split.

    Attributes:
      tokens: the joined documents (N,), uint16 or uint32.
      offsets: int64 (documents + 1,), where each begins; the last is N.
      scored: bool (N,), whether a token is to be predicted; None: all are.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    scored: np.ndarray | None = None


def open_or_build(
    folder: Path,
    source: documents.Documents,
    data: config_lib.DataConfig,
    tokenizer: tokenizers.Tokenizer,
) -> tuple[dict[str, Any], dict[str, TokenFile]]:
    """The manifest and the splits; tokenises where they are not there yet.

    Several processes may call this at once: one works and the others wait.

    Args:
      folder: of all token files.
      source: the documents.
      data: `data.tokenizer` made `tokenizer`.
      tokenizer: gives the ids.

    Raises:
      UserError: no text, text that the tokenizer does not take, a full disk, or a
        folder that cannot be written.
    """
    key = {
        "format_version": FORMAT_VERSION,
        "source": source.identity,
        "tokenizer": tokenizer.describe(),
        "validation_fraction": data.validation_fraction,
    }
    return prepared.open_or_build(
        folder, key, read, lambda path: _write(path, key, source, data, tokenizer)
    )


def read(path: Path) -> tuple[dict[str, Any], dict[str, TokenFile]]:
    """Opens a prepared folder; reads the manifest and the sizes of the files.

    Raises:
      FileNotFoundError: there is no such folder.
      DamagedError: it is not what its manifest says.
    """
    if not path.is_dir():
        raise FileNotFoundError(path)
    with prepared.damage():
        manifest = prepared.read_manifest(path, FORMAT_VERSION)
        splits = {
            name: _open_split(path, manifest["splits"][name], manifest["dtype"])
            for name in documents.SPLITS
        }
    return manifest, splits


def _open_split(path: Path, split: dict[str, Any], dtype: str) -> TokenFile:
    files = {k: prepared.checked(path, entry) for k, entry in split["files"].items()}
    if dtype not in ("uint16", "uint32"):
        raise DamagedError(f"dtype {dtype!r}")
    tokens = np.zeros(0, dtype)
    if split["tokens"]:  # an empty file cannot be mapped
        tokens = np.memmap(files["tokens"], dtype, mode="r")
    offsets = npy.mapped(files["offsets"])
    if offsets.dtype != np.int64 or offsets.shape != (split["documents"] + 1,):
        raise DamagedError(f"{files['offsets'].name} has another shape")
    if not offsets[-1] == len(tokens) == split["tokens"]:
        raise DamagedError(f"{files['tokens'].name} has another number of tokens")
    if "scored" not in files:
        return TokenFile(tokens, offsets)
    scored = np.zeros(0, bool)
    if split["tokens"]:
        scored = np.memmap(files["scored"], bool, mode="r")
    if len(scored) != len(tokens):
        raise DamagedError(f"{files['scored'].name} has another number of tokens")
    return TokenFile(tokens, offsets, scored)


def _write(folder: Path, key, source, data, tokenizer) -> None:
    dtype = workers.token_dtype(tokenizer.vocab_size)
    _log.info("tokenizing into %s", folder.parent)
    splits = {}
    for name in documents.SPLITS:
        chunks = _chunks(_pieces(source.split(name)))
        parts = workers.tokenize_all(data.tokenizer, tokenizer, chunks, data.workers)
        with contextlib.closing(parts):
            splits[name] = _write_split(folder, name, dtype, parts, source.examples)
        if name == "train" and not splits[name]["tokens"]:
            raise UserError(
                f"data.source={data.source}: there is no text to train on; every "
                "document is empty or held out (data.validation_fraction="
                f"{data.validation_fraction})"
            )
    manifest = key | {
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "splits": splits,
    }
    prepared.write_manifest(folder, manifest)
    for name, split in splits.items():
        counts = {k: split[k] for k in ("documents", "tokens", "bytes")}
        _log.info("%s: %s", name, counts)


def _write_split(
    folder: Path,
    name: str,
    dtype: np.dtype,
    parts: Iterable[workers.Tokens],
    examples: bool,
) -> dict[str, Any]:
    """Writes one split and returns its entry of the manifest."""
    lengths = _DocumentLengths()
    num_bytes = num_scored = 0
    with contextlib.ExitStack() as stack:
        tokens_file = stack.enter_context(prepared.Hashed(folder / f"{name}.tokens"))
        if examples:
            scored_file = stack.enter_context(
                prepared.Hashed(folder / f"{name}.scored")
            )
        for part in parts:
            tokens_file.write(np.ascontiguousarray(part.tokens, dtype).tobytes())
            if examples:
                scored_file.write(np.repeat(part.scored, part.lengths).tobytes())
                num_scored += int(part.lengths[part.scored].sum())
            lengths.add(part)
            num_bytes += part.num_bytes
    offsets = lengths.offsets()
    files = {
        "tokens": tokens_file.entry(),
        "offsets": prepared.write_array(folder / f"{name}.offsets.npy", offsets),
    }
    split = {
        "documents": len(offsets) - 1,
        "tokens": int(offsets[-1]),
        "bytes": num_bytes,
        "files": files,
    }
    if examples:
        files["scored"] = scored_file.entry()
        split["scored"] = num_scored
    return split


class _DocumentLengths:
    """Adds up the lengths of pieces to those of documents."""

    def __init__(self):
        self._begun = 0  # tokens of a document whose end is in a later part
        self._lengths = []

    def add(self, part: workers.Tokens) -> None:
        sums = np.cumsum(part.lengths)
        ends = sums[part.ends]
        if len(ends):
            lengths = np.diff(ends, prepend=0)
            lengths[0] += self._begun
            # Rows count documents by where they begin: none may be empty.
            self._lengths.append(lengths[lengths > 0])
            self._begun = 0
        self._begun += int(sums[-1] - (ends[-1] if len(ends) else 0))

    def offsets(self) -> np.ndarray:
        return np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths]))


def _pieces(found: Iterable[tuple[str, documents.Text]]) -> Iterator[workers.Piece]:
    """Documents, long ones cut at line ends so that memory stays bounded."""
    for name, text in found:
        if not isinstance(text, bytes):
            yield from _spans(name, text)
            continue
        start = 0
        while start < len(text):
            stop = min(start + _PIECE_BYTES, len(text))
            if stop < len(text):
                stop = documents.cut_before(text, stop, start + 1)
            yield workers.Piece(name, text[start:stop], start, stop == len(text))
            start = stop


def _spans(name: str, spans: tuple[documents.Span, ...]) -> Iterator[workers.Piece]:
    held = [span for span in spans if span.text]
    offset = 0
    for span in held:
        ends = span is held[-1]
        yield workers.Piece(name, span.text, offset, ends, span.scored, span.markup)
        offset += len(span.text)


def _chunks(pieces: Iterable[workers.Piece]) -> Iterator[list[workers.Piece]]:
    chunk, size = [], 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece.text)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
