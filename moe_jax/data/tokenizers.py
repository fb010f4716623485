"""Tokenizers: bytes to token ids and back."""

import contextlib
import hashlib
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import config as config_lib
from moe_jax.errors import UserError, nearest


@config_lib.node
class Bytes(config_lib.TokenizerConfig):
    """One token a byte, with a begin and an end of document: 258 tokens."""


@config_lib.node
class HuggingFaceTokenizer(config_lib.TokenizerConfig):
    """A `tokenizer.json` file; needs the package that the extra `hf` installs.

    Attributes:
      path: the file.
      bos: token that begins a document; "" for none.
      eos: token that ends a document; "" for none.
    """

    path: str = "tokenizer.json"
    bos: str = ""
    eos: str = ""

    def problems(self, path, root):
        if not self.path:
            yield f"{path}.path='': must name a tokenizer.json"


class BytesTokenizer:
    """What `Bytes` configures.

    Attributes:
      vocab_size: number of ids.
      bos_id: id that begins a document, or None.
      eos_id: id that ends a document, or None.
      parallel: whether it is slow enough for a pool of processes to pay.
    """

    vocab_size = 258
    bos_id = 256
    eos_id = 257
    parallel = False

    def __init__(self, config: Bytes):
        del config

    def encode(
        self, text: bytes, name: str = "text", offset: int = 0, markup: bool = False
    ) -> np.ndarray:
        """Ids without begin and end of document, int32 (number of bytes,)."""
        del name, offset, markup
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids; ids that stand for no byte are left out."""
        ids = np.asarray(ids).reshape(-1)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

    def describe(self) -> dict[str, Any]:
        """JSON-ready; equal descriptions mean equal ids."""
        return {"kind": "bytes", "bos_id": self.bos_id, "eos_id": self.eos_id}


@contextlib.contextmanager
def _damage(where: str) -> Iterator[None]:
    """Within it, what the package `tokenizers` makes of a wrong file is a UserError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    # The package raises the bare class, and a panic of its Rust is no Exception.
    except BaseException as error:
        raise UserError(f"{where} is no tokenizer.json that works: {error}") from None


class HuggingFaceJsonTokenizer:
    """What `HuggingFaceTokenizer` configures; see `BytesTokenizer`.

    Raises:
      UserError: the package or the file is missing, the file is damaged, or `bos` or
        `eos` is not in its vocabulary.
    """

    parallel = True

    def __init__(self, config: HuggingFaceTokenizer):
        path = Path(config.path).expanduser()
        where = f"data.tokenizer.path={config.path!r}"
        try:
            tokenizers = importlib.import_module("tokenizers")
        except ImportError:
            raise UserError(
                f"{where} needs the package tokenizers: pip install 'moe_jax[hf]'"
            ) from None
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{where}: cannot read it ({error.strerror}); give the tokenizer.json "
                "of a Hugging Face model"
            ) from None
        self._where = where
        with _damage(where):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        # A file may ask for either, which would cut or lengthen documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.bos_id = _special(vocabulary, "bos", config.bos)
        self.eos_id = _special(vocabulary, "eos", config.eos)
        self._digest = hashlib.sha256(content).hexdigest()

    def encode(
        self, text: bytes, name: str = "text", offset: int = 0, markup: bool = False
    ) -> np.ndarray:
        """Ids without begin and end of document.

        Args:
          text: UTF-8.
          name: the document, for the message.
          offset: where `text` begins in the document, for the message.
          markup: whether the names of special tokens stand for these.

        Returns:
          int32 (number of tokens,).

        Raises:
          UserError: `text` is not UTF-8.
        """
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"document {name!r} is not UTF-8 at byte {offset + error.start} "
                f"(0x{text[error.start]:02x}); convert it, leave it out, or use "
                "data.tokenizer=Bytes(), which takes any bytes"
            ) from None
        self._tokenizer.encode_special_tokens = not markup
        with _damage(self._where):
            encoding = self._tokenizer.encode(decoded, add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        """UTF-8 of the ids; special tokens are left out."""
        specials = {self.bos_id, self.eos_id}
        ids = [i for i in np.asarray(ids).reshape(-1).tolist() if i not in specials]
        with _damage(self._where):
            return self._tokenizer.decode(ids, skip_special_tokens=True).encode()

    def describe(self) -> dict[str, Any]:
        """JSON-ready; equal descriptions mean equal ids."""
        return {
            "kind": "hugging_face",
            "sha256": self._digest,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }


Tokenizer = BytesTokenizer | HuggingFaceJsonTokenizer
TOKENIZERS = {
    Bytes: BytesTokenizer,
    HuggingFaceTokenizer: HuggingFaceJsonTokenizer,
}


def make_tokenizer(config: config_lib.TokenizerConfig) -> Tokenizer:
    """The tokenizer that a config describes.

    Raises:
      UserError: its file or package is missing.
    """
    return TOKENIZERS[type(config)](config)


def _special(vocabulary: dict[str, int], field: str, token: str) -> int | None:
    if not token:
        return None
    if token not in vocabulary:
        raise UserError(
            f"data.tokenizer.{field}={token!r} is not in the tokenizer's vocabulary"
            f"{nearest(token, vocabulary)}"
        )
    return vocabulary[token]
