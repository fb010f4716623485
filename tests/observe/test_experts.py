"""The table of experts, against counts by hand."""

import numpy as np

from moe_jax.observe import experts

WORDS = ["the", " a", "\n", "x\x1b"]


def decode(ids):
    return "".join(WORDS[i] for i in ids)


def test_table_by_hand():
    counts_le = np.array([[6, 2, 0, 0], [1, 1, 1, 1]])
    tokens_le = np.full((2, 4, 2), -1)
    tokens_le[0, 0] = [0, 2]
    tokens_le[0, 1] = [3, -1]
    lines = experts.expert_table(counts_le, tokens_le, decode).splitlines()
    assert lines[1] == "layer 0: max/mean 3.00, 2 of 4 dead (2, 3)"
    assert lines[2] == "     0   3.00 ############  'the' '\\n'"
    assert lines[3] == "     1   1.00 ####          'x\\x1b'"
    assert lines[4] == "     2   0.00"
    assert lines[6] == "layer 1: max/mean 1.00, none dead"
    assert len(lines) == 11


def test_many_experts_shows_the_busiest():
    counts_le = np.arange(32)[None]
    lines = experts.expert_table(counts_le, most=3).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["29", "30", "31"]
    assert lines[5].strip() == "... and 29 that served less"


def test_a_long_bar_is_cut_and_lines_stay_short():
    counts_le = np.array([[100] + [0] * 9])
    tokens_le = np.zeros((1, 10, 60), int)
    table = experts.expert_table(counts_le, tokens_le, decode)
    assert " 10.00 ###########+  'the'" in table
    assert max(map(len, table.splitlines())) <= 100


def test_a_layer_without_tokens():
    assert "layer 0: no tokens" in experts.expert_table(np.zeros((1, 4), int))
