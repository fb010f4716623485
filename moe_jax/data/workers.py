"""A pool of processes that tokenise.

The workers are plain subprocesses that speak over pipes. The pools of the standard
library would import the user's main module in every worker, which a script without
`if __name__ == "__main__"` does not survive, or would fork under JAX's threads.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax import config as config_lib
from moe_jax.data import tokenizers
from moe_jax.errors import UserError

# With fewer chunks than this, starting processes takes longer than the work.
_POOL_FROM_CHUNKS = 3


class Piece(NamedTuple):
    """A document or, where it is long, a part of one."""

    name: str
    text: bytes
    offset: int  # of `text` in the document, in bytes
    ends: bool  # whether the document ends here
    scored: bool = True  # see `documents.Span`
    markup: bool = False


class Tokens(NamedTuple):
    """The tokens of a chunk of pieces, joined, with one length a piece."""

    tokens: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    scored: np.ndarray
    num_bytes: int  # of what is scored


def tokenize(tokenizer: tokenizers.Tokenizer, pieces: list[Piece]) -> Tokens:
    """Tokens of `pieces` with the begin and end of each document.

    Raises:
      UserError: a document is not what the tokenizer takes.
    """
    parts = []
    for piece in pieces:
        ids = [_encoded(tokenizer, piece)]
        if piece.offset == 0 and tokenizer.bos_id is not None:
            ids.insert(0, np.array([tokenizer.bos_id], np.int32))
        if piece.ends and tokenizer.eos_id is not None:
            ids.append(np.array([tokenizer.eos_id], np.int32))
        parts.append(np.concatenate(ids))
    dtype = token_dtype(tokenizer.vocab_size)
    return Tokens(
        np.concatenate(parts).astype(dtype),
        np.array([len(part) for part in parts], np.int64),
        np.array([piece.ends for piece in pieces], bool),
        np.array([piece.scored for piece in pieces], bool),
        sum(len(piece.text) for piece in pieces if piece.scored),
    )


def _encoded(tokenizer: tokenizers.Tokenizer, piece: Piece) -> np.ndarray:
    given = piece.text, piece.name, piece.offset
    return tokenizer.encode(*given, markup=piece.markup)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def tokenize_all(
    config: config_lib.TokenizerConfig,
    tokenizer: tokenizers.Tokenizer,
    chunks: Iterable[list[Piece]],
    workers: int,
) -> Iterator[Tokens]:
    """`tokenize` of every chunk in order, in several processes where that pays.

    Args:
      config: what `tokenizer` was made from.
      tokenizer: for the work that is done here.
      chunks: read as they are needed.
      workers: processes; 0 uses all cores.

    Raises:
      UserError: as `tokenize`.
    """
    workers = workers or os.cpu_count() or 1
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, _POOL_FROM_CHUNKS))
    chunks = itertools.chain(first, chunks)
    if workers == 1 or len(first) < _POOL_FROM_CHUNKS or not tokenizer.parallel:
        yield from (tokenize(tokenizer, chunk) for chunk in chunks)
        return
    with Pool(config, workers) as pool:
        yield from pool.map(chunks)


class Pool:
    """Worker processes, each served by a thread; use it in a `with`."""

    def __init__(self, config: config_lib.TokenizerConfig, workers: int):
        # The workers import what this process can, wherever it was started.
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        # Each worker is one thread: there is one of them a core already.
        environment["TOKENIZERS_PARALLELISM"] = "false"
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for _ in range(workers)
        ]
        self._idle = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
            _send(process.stdin, config)
        self._threads = concurrent.futures.ThreadPoolExecutor(workers)

    def map(self, chunks: Iterable[list[Piece]]) -> Iterator[Tokens]:
        """`tokenize` of each chunk in order; reads ahead two chunks a worker."""
        pending = collections.deque()
        for chunk in chunks:
            pending.append(self._threads.submit(self._work, chunk))
            if len(pending) > 2 * len(self._processes):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _work(self, chunk: list[Piece]) -> Tokens:
        process = self._idle.get()
        try:
            _send(process.stdin, chunk)
            answer = pickle.load(process.stdout)
        except (OSError, EOFError):
            raise UserError(
                f"data.workers: a tokenizing process ended with status "
                f"{process.wait()} (out of memory?); set --config.data.workers=1"
            ) from None
        finally:
            self._idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def _send(file: Any, value: Any) -> None:
    pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)
    file.flush()


def serve() -> None:
    """The worker: reads a tokenizer config, then chunks, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    # Anything printed by a library must not mix with the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tokenizer = tokenizers.make_tokenizer(pickle.load(sys.stdin.buffer))
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = tokenize(tokenizer, chunk)
        except UserError as error:
            answer = error
        with contextlib.suppress(BrokenPipeError):
            _send(answers, answer)
