"""Compressors of the held-out text, to read bits per byte against.

Neither learns anything but byte statistics: a language model that is worse than the
order-2 model has not learned to spell.
"""

import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from moe_jax.errors import UserError

_BATCH_BYTES = 4 << 20


def gzip_bits_per_byte(documents: Iterable[bytes]) -> float:
    """Bits per byte of `gzip -9` over the joined documents.

    Raises:
      UserError: there is no text.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    before = after = 0
    for document in documents:
        before += len(document)
        after += len(packer.compress(document))
    after += len(packer.flush())
    return 8 * after / _at_least_one(before)


def order2_bits_per_byte(
    train_documents: Iterable[bytes], heldout_documents: Iterable[bytes]
) -> float:
    """Bits per byte of an order-2 byte model with Witten-Bell interpolation.

    P_n(c|h) = (n(hc) + T(h) P_{n-1}(c|h')) / (n(h) + T(h)), where h' drops the oldest
    byte of h and T(h) counts the different bytes seen after h; P_{-1} = 1/256. A
    document's first bytes have only the shorter contexts (Witten and Bell 1991,
    method C, interpolated).

    Raises:
      UserError: there is no held-out text.
    """
    tables = _count(train_documents)
    nats = num_bytes = 0
    for text, depth in _batches(heldout_documents):
        nats -= np.log(_probabilities(text, depth, tables)).sum()
        num_bytes += len(text)
    return float(nats / np.log(2)) / _at_least_one(num_bytes)


def _at_least_one(num_bytes: int) -> int:
    if not num_bytes:
        raise UserError(
            "baselines: there is no held-out text to compress; set "
            "data.validation_fraction above 0 or name a validation split"
        )
    return num_bytes


def _batches(documents: Iterable[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Joined documents in parts: the bytes, and how many precede each (up to 2)."""
    texts, size = [], 0
    for document in documents:
        texts.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield _join(texts)
            texts, size = [], 0
    if size:
        yield _join(texts)


def _join(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    texts = [text for text in texts if text]
    joined = np.frombuffer(b"".join(texts), np.uint8)
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths) - lengths
    depth = np.full(len(joined), 2, np.uint8)
    depth[starts] = 0
    depth[starts[lengths > 1] + 1] = 1
    return joined, depth


def _contexts(text: np.ndarray, order: int) -> np.ndarray:
    """The number that the `order` bytes before each byte spell, int32."""
    context = np.zeros(len(text), np.int32)
    for back in range(order, 0, -1):
        context[back:] = (context[back:] << 8) | text[: len(text) - back]
    return context


def _count(documents: Iterable[bytes]) -> list[tuple[np.ndarray, ...]]:
    """For orders 0, 1, 2: n(hc) int64 (256**order, 256), n(h), and T(h)."""
    counts = [np.zeros(256 ** (order + 1), np.int64) for order in range(3)]
    for text, depth in _batches(documents):
        for order, count in enumerate(counts):
            known = depth >= order
            grams = (_contexts(text, order)[known] << 8) | text[known]
            count += np.bincount(grams, minlength=len(count))
    tables = [count.reshape(-1, 256) for count in counts]
    return [(table, table.sum(1), (table > 0).sum(1)) for table in tables]


def _probabilities(text, depth, tables) -> np.ndarray:
    p = np.full(len(text), 1 / 256)
    for order, (counts, totals, kinds) in enumerate(tables):
        context = _contexts(text, order)
        # A context that training never saw says nothing: keep the shorter one's.
        known = (depth >= order) & (totals[context] > 0)
        h, c = context[known], text[known]
        p[known] = (counts[h, c] + kinds[h] * p[known]) / (totals[h] + kinds[h])
    return p
