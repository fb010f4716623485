"""Packing against loops over documents."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.data import packing

DOCUMENTS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def stream(lengths):
    """A stream whose tokens are all different, and its offsets."""
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return np.arange(100, 100 + offsets[-1], dtype=np.uint16), offsets


def slow_row(lengths, row, sequence_length):
    """The definition, token by token."""
    owner = [d for d, length in enumerate(lengths) for _ in range(length)]
    out = packing.padding_rows(1, sequence_length)
    out = {name: value[0] for name, value in out.items()}
    position = segment = 0
    for i in range(sequence_length):
        t = row * sequence_length + i
        if t >= len(owner):
            break
        new = i == 0 or owner[t] != owner[t - 1]
        segment += new
        position = 0 if new else position + 1
        out["tokens"][i] = 100 + t
        out["segments"][i] = segment
        out["positions"][i] = position
        if t + 1 < len(owner):
            out["targets"][i] = 100 + t + 1
            out["weights"][i] = owner[t + 1] == owner[t]
    return out


def row_of(tokens, offsets, number, sequence_length):
    rows = packing.make_rows(tokens, offsets, [number], sequence_length)
    return {name: value[0] for name, value in rows.items()}


def assert_rows_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        assert got[name].dtype == want[name].dtype, name


@hypothesis.given(DOCUMENTS, st.integers(1, 12))
@hypothesis.settings(deadline=None, max_examples=50)
def test_documents_of_rows(lengths, sequence_length):
    _, offsets = stream(lengths)
    owner = [d for d, length in enumerate(lengths) for _ in range(length)]
    count = packing.num_rows(len(owner), sequence_length)
    cuts = [owner[r * sequence_length :][:sequence_length] for r in range(count)]
    got = packing.documents_of(offsets, range(count), sequence_length)
    assert got.tolist() == [[cut[0], cut[-1]] for cut in cuts]


def test_documents_of_rows_that_hold_them_whole():
    _, offsets = stream([3, 2, 4, 9])
    begins = packing.whole_rows(offsets, 6)
    got = packing.documents_of(offsets, [0, 1, 2, 3], 6, begins)
    assert got.tolist() == [[0, 1], [2, 2], [3, 3], [3, 3]]


def test_row_by_hand():
    tokens, offsets = stream([3, 2, 4])
    row = row_of(tokens, offsets, 1, 4)
    np.testing.assert_array_equal(row["tokens"], [104, 105, 106, 107])
    np.testing.assert_array_equal(row["targets"], [105, 106, 107, 108])
    np.testing.assert_array_equal(row["weights"], [0, 1, 1, 1])
    np.testing.assert_array_equal(row["segments"], [1, 2, 2, 2])
    np.testing.assert_array_equal(row["positions"], [0, 0, 1, 2])


@hypothesis.given(DOCUMENTS, st.integers(1, 12))
@hypothesis.settings(deadline=None, max_examples=200)
def test_rows_match_loop_over_documents(lengths, sequence_length):
    tokens, offsets = stream(lengths)
    count = packing.num_rows(len(tokens), sequence_length)
    numbers = [*range(count + 2)][::-1]  # two more, which are padding
    got = packing.make_rows(tokens, offsets, numbers, sequence_length)
    wanted = [slow_row(lengths, number, sequence_length) for number in numbers]
    assert_rows_equal(got, {n: np.stack([w[n] for w in wanted]) for n in got})


@hypothesis.given(DOCUMENTS, st.integers(1, 12))
@hypothesis.settings(deadline=None, max_examples=100)
def test_each_token_but_first_of_document_is_scored_once(lengths, sequence_length):
    tokens, offsets = stream(lengths)
    scored = []
    for number in range(packing.num_rows(len(tokens), sequence_length)):
        row = row_of(tokens, offsets, number, sequence_length)
        scored += row["targets"][row["weights"] > 0].tolist()
    firsts = set(tokens[offsets[:-1]].tolist())
    assert scored == [t for t in tokens.tolist() if t not in firsts]


@pytest.mark.parametrize(
    ("num_tokens", "full", "all_rows"), [(0, 0, 0), (8, 2, 2), (9, 2, 3)]
)
def test_row_counts(num_tokens, full, all_rows):
    assert packing.num_full_rows(num_tokens, 4) == full
    assert packing.num_rows(num_tokens, 4) == all_rows
