"""The global index: what row n of a split is.

Documents are joined in their order and the stream of N tokens is cut every S tokens.
Row r has the inputs [r*S, (r+1)*S) and, as targets, the tokens one further on. A
target counts where it lies in the same document as its input, so that every token of
a document but its first (the begin of document, where the tokenizer has one) is
scored exactly once. No attention should cross documents: `segments` says which are
which and `positions` restarts with each.

Examples, of which only some tokens are scored, are not cut where a row can hold them:
`whole_rows` says where each row begins then.
"""

import numpy as np
from numpy.typing import ArrayLike

Rows = dict[str, np.ndarray]


def num_full_rows(num_tokens: int, sequence_length: int) -> int:
    """Rows without padding: what training sees."""
    return num_tokens // sequence_length


def num_rows(num_tokens: int, sequence_length: int) -> int:
    """All rows, the padded last one with them: what evaluation sees."""
    return -(-num_tokens // sequence_length)


def whole_rows(offsets: np.ndarray, sequence_length: int) -> np.ndarray:
    """Where rows of whole documents begin, and where the last ends: int64 (rows + 1,).

    Each takes as many documents as fit, in their order. One that is longer than a row
    begins one, and is cut.
    """
    begins = [0]
    while begins[-1] < offsets[-1]:
        most = begins[-1] + sequence_length
        end = int(offsets[np.searchsorted(offsets, most, side="right") - 1])
        if end <= begins[-1]:
            after = np.searchsorted(offsets, begins[-1], side="right")
            end = min(most, int(offsets[after]))
        begins.append(end)
    return np.array(begins, np.int64)


def make_rows(
    tokens: np.ndarray,
    offsets: np.ndarray,
    numbers: ArrayLike,
    sequence_length: int,
    begins: np.ndarray | None = None,
    scored: np.ndarray | None = None,
) -> Rows:
    """The rows of these numbers, in time that does not depend on the split's size.

    Args:
      tokens: the joined documents (N,), any integer type.
      offsets: int64 (documents + 1,), where each begins; the last is N. None is empty.
      numbers: (b,) from 0; past the last row there is only padding.
      sequence_length: S.
      begins: (rows + 1,), of `whole_rows`; None: every S tokens.
      scored: bool (N,), whether a token counts as a target; None: all do.

    Returns:
      `tokens` int32 (b, S), 0 where padded; `targets` int32 (b, S), 0 where there is
      none; `weights` float32 (b, S), 1 where the target counts; `positions` int32
      (b, S) within the segment; `segments` int32 (b, S), 1, 2, .. by document, 0 where
      padded.
    """
    start_b, length_b = _extents(offsets, numbers, sequence_length, begins)
    out = padding_rows(len(start_b), sequence_length)
    for b, (start, length) in enumerate(
        zip(start_b.tolist(), length_b.tolist(), strict=True)
    ):
        following = tokens[start + 1 : start + length + 1]
        out["tokens"][b, :length] = tokens[start : start + length]
        out["targets"][b, : len(following)] = following
        out["weights"][b, :length] = 1
        if scored is not None:
            out["weights"][b, : len(following)] = scored[start + 1 : start + length + 1]
    row_d, begin_d = _begins(offsets, start_b, length_b)
    out["weights"][row_d, begin_d - 1] = 0  # an input that ends its document
    inside_d = begin_d < length_b[row_d]
    row_d, begin_d = row_d[inside_d], begin_d[inside_d]
    # Documents are counted, and the place of the last begin kept, up to each token.
    segments, begins = out["segments"], out["positions"]
    segments[:, 0], segments[row_d, begin_d] = 1, 1
    np.cumsum(segments, axis=1, out=segments)
    begins[row_d, begin_d] = begin_d
    np.maximum.accumulate(begins, axis=1, out=begins)
    index = np.arange(sequence_length, dtype=np.int32)
    np.subtract(index, begins, out=out["positions"])
    for b in np.flatnonzero(length_b < sequence_length):
        segments[b, length_b[b] :] = out["positions"][b, length_b[b] :] = 0
    return out


def documents_of(
    offsets: np.ndarray,
    numbers: ArrayLike,
    sequence_length: int,
    begins: np.ndarray | None = None,
) -> np.ndarray:
    """The first and the last document of each row, int64 (b, 2), from 0.

    The arguments are those of `make_rows`; the rows must hold something.
    """
    start_b, length_b = _extents(offsets, numbers, sequence_length, begins)
    ends = np.stack([start_b, start_b + length_b - 1], axis=1)
    return np.searchsorted(offsets, ends, side="right") - 1


def _extents(offsets, numbers, sequence_length, begins):
    """Where rows begin, and how many tokens each holds, (b,) each."""
    numbers = np.asarray(numbers, np.int64)
    if begins is None:
        start_b = numbers * sequence_length
        return start_b, np.clip(int(offsets[-1]) - start_b, 0, sequence_length)
    edges = begins[np.minimum([numbers, numbers + 1], len(begins) - 1)]
    return edges[0], edges[1] - edges[0]


def _begins(
    offsets: np.ndarray, start_b: np.ndarray, length_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where documents begin, (D,) each: in which row, and at which place in (0, S].

    One that begins right after a row is among them: it tells whether the last target
    lies in another document.
    """
    first_b = np.searchsorted(offsets, start_b, side="right")
    count_b = np.searchsorted(offsets, start_b + length_b, side="right") - first_b
    row_d = np.repeat(np.arange(len(start_b)), count_b)
    before_b = np.cumsum(count_b) - count_b
    document_d = np.arange(len(row_d)) + (first_b - before_b)[row_d]
    return row_d, offsets[document_d] - start_b[row_d]


def padding_rows(count: int, sequence_length: int) -> Rows:
    """`count` rows in which nothing counts; each array is (count, S)."""
    dtypes = {
        "tokens": np.int32,
        "targets": np.int32,
        "weights": np.float32,
        "positions": np.int32,
        "segments": np.int32,
    }
    shape = (count, sequence_length)
    return {name: np.zeros(shape, dtype) for name, dtype in dtypes.items()}
