"""The global index: what row n of a split is.

Documents are joined in their order and the stream of N tokens is cut every S tokens.
Row r has the inputs [r*S, (r+1)*S) and, as targets, the tokens one further on. A
target counts where it lies in the same document as its input, so that every token of
a document but its first (the begin of document, where the tokenizer has one) is
scored exactly once. No attention should cross documents: `segments` says which are
which and `positions` restarts with each.
"""

import numpy as np

Row = dict[str, np.ndarray]


def num_full_rows(num_tokens: int, sequence_length: int) -> int:
    """Rows without padding: what training sees."""
    return num_tokens // sequence_length


def num_rows(num_tokens: int, sequence_length: int) -> int:
    """All rows, the padded last one with them: what evaluation sees."""
    return -(-num_tokens // sequence_length)


def make_row(
    tokens: np.ndarray, offsets: np.ndarray, row: int, sequence_length: int
) -> Row:
    """Row number `row`, in time that does not depend on the size of the split.

    Args:
      tokens: the joined documents (N,), any integer type.
      offsets: int64 (documents + 1,), where each begins; the last is N. None is empty.
      row: from 0; past the last there is only padding.
      sequence_length: S.

    Returns:
      `tokens` int32 (S,), 0 where padded; `targets` int32 (S,), 0 where there is
      none; `weights` float32 (S,), 1 where the target counts; `positions` int32 (S,)
      within the segment; `segments` int32 (S,), 1, 2, .. by document, 0 where padded.
    """
    out = padding_rows(1, sequence_length)
    out = {name: value[0] for name, value in out.items()}
    num_tokens = int(offsets[-1])
    start = row * sequence_length
    stop = min(start + sequence_length, num_tokens)
    length = stop - start
    if length <= 0:
        return out
    # Documents first..last have a token here; `last` may begin right after the row,
    # which tells whether the last target lies in another document.
    first = int(np.searchsorted(offsets, start, side="right")) - 1
    last = int(np.searchsorted(offsets, stop, side="right")) - 1
    starts = np.asarray(offsets[first + 1 : last + 1]) - start
    inside = starts[starts < length]

    out["tokens"][:length] = tokens[start:stop]
    following = tokens[start + 1 : stop + 1]
    out["targets"][: len(following)] = following
    out["weights"][:length] = 1
    out["weights"][starts - 1] = 0  # an input that ends its document
    new = np.zeros(length, np.int32)
    new[inside] = 1
    out["segments"][:length] = 1 + np.cumsum(new)
    index = np.arange(length, dtype=np.int32)
    out["positions"][:length] = index - np.maximum.accumulate(index * new)
    return out


def padding_rows(count: int, sequence_length: int) -> Row:
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


def stack(rows: list[Row]) -> Row:
    """Rows (S,) as a batch (number of rows, S)."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
