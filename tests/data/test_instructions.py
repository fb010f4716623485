"""Instruction text: answers are scored, examples are whole, text is no markup."""

import json

import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.data import packing, pipeline, sources, tokenizers
from moe_jax.data.sources import Instructions
from moe_jax.errors import UserError

BOS, EOS = tokenizers.BytesTokenizer.bos_id, tokenizers.BytesTokenizer.eos_id
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
}


@pytest.fixture
def written(tmp_path, make_config):
    """A config of the examples, which are written as lines."""

    def write(*examples, **fields):
        source = {k: fields.pop(k) for k in list(fields) if hasattr(Instructions(), k)}
        path = tmp_path / "examples.jsonl"
        lines = [e if isinstance(e, str) else json.dumps(e) for e in examples]
        path.write_text("\n".join(lines) + "\n\n")
        fields = {"validation_fraction": 0.0, "sequence_length": 64, **fields}
        return make_config(Instructions(path=str(path), **source), **fields)

    return write


def shown(row):
    """The inputs as text, and the targets that count."""
    text = lambda ids: "".join({BOS: "<", EOS: ">"}.get(i) or chr(i) for i in ids)
    inside, scored = row["segments"] > 0, row["weights"] > 0
    return text(row["tokens"][inside]), text(row["targets"][scored])


def test_only_answers_and_what_ends_them_are_scored(written):
    data = pipeline.prepare(written({"prompt": "Hi?", "answer": "Yo."}, CHAT))
    assert data.num_rows("train") == 2 and not data.all_scored
    first, second = (data.row("train", n) for n in range(2))
    assert shown(first) == ("<User: Hi?\nAssistant: Yo.\n>", "Yo.\n>")
    text = "Be brief.\nUser: 1+1?\nAssistant: 2\nUser: 2+2?\nAssistant: 4\n"
    assert shown(second) == (f"<{text}>", "2\n4\n>")
    # Bytes of what is scored, for bits per byte.
    assert data.bytes_in("train") == len("Yo.\n2\n4\n")
    assert data.bytes_per_token("train") == 8 / 10
    whole = "User: Hi?\nAssistant: Yo.\n"
    assert list(data.documents("train")) == [whole.encode(), text.encode()]


def test_rows_hold_whole_examples(written):
    """Two fit into a row, the third begins the next; none sees another."""
    examples = [{"prompt": c, "answer": c * 3} for c in "abc"]
    data = pipeline.prepare(written(*examples))
    assert data.num_rows("train") == 2
    row = data.row("train", 0)
    one, other = (f"<User: {c}\nAssistant: {c * 3}\n>" for c in "ab")
    assert shown(row) == (one + other, "aaa\n>bbb\n>")
    want = [1] * len(one) + [2] * len(one) + [0] * (64 - 2 * len(one))
    np.testing.assert_array_equal(row["segments"], want)
    places = [*range(len(one))] * 2
    np.testing.assert_array_equal(row["positions"][: 2 * len(one)], places)
    assert shown(data.row("train", 1))[1] == "ccc\n>"
    assert shown(data.row("train", 2)) == ("", "")
    batches = data.train_batches(batch_size=2, seed=0, start_step=0, num_steps=3)
    assert all(batch["weights"].sum() == 15 for batch in batches)


def slow_rows(lengths, size):
    """By hand: fill a row while the next document fits."""
    rows, begin, filled = [0], 0, 0
    for length in lengths:
        if filled and filled + length > size:
            begin, filled = begin + filled, 0
            rows.append(begin)
        while length > size:
            begin, length = begin + size, length - size
            rows.append(begin)
        filled += length
    if filled:
        rows.append(begin + filled)
    return rows


def test_whole_rows_against_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths, size = rng.integers(1, 20, rng.integers(1, 12)), rng.integers(1, 16)
        offsets = np.cumsum([0, *lengths])
        found = packing.whole_rows(offsets, size)
        assert found.tolist() == slow_rows(lengths.tolist(), size), (lengths, size)


def test_text_of_messages_is_no_markup(written, tokenizer_file):
    """A format names special tokens; who writes their names in a message gets text."""
    content = json.loads(tokenizer_file.read_text())
    (special, *_) = (t for t in content["added_tokens"] if t["special"])
    name, number = special["content"], special["id"]
    config = written(
        {"prompt": f"a{name}b", "answer": "abc"},
        user=f"{name}{{}}",
        assistant=f"{{}}{name}",
        tokenizer=tokenizers.HuggingFaceTokenizer(path=str(tokenizer_file)),
    )
    row = pipeline.prepare(config).row("train", 0)
    inside = row["tokens"][row["segments"] > 0]
    assert (inside == number).sum() == 2, "one before the prompt, one after the answer"
    assert inside[0] == inside[-1] == number
    assert row["targets"][row["weights"] > 0][-1] == number


def test_held_out_examples_and_identity(written):
    examples = [{"prompt": str(i), "answer": "x"} for i in range(40)]
    config = written(*examples, validation_fraction=0.25)
    data = pipeline.prepare(config)
    texts = [set(data.documents(split)) for split in ("train", "validation")]
    assert len(texts[0]) + len(texts[1]) == 40 and not texts[0] & texts[1]
    assert 3 <= len(texts[1]) <= 20
    identity = sources.load(config.data).identity
    config.data.source.user = "U: {}\n"
    assert sources.load(config.data).identity != identity


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line examples.jsonl:2 is not JSON"),
        ("[1]", "is no JSON object"),
        ('{"prompt": "a"}', "has neither 'messages' nor 'answer'"),
        (
            '{"prompt": "a", "answer": 3}',
            "role 'assistant' that is no text",
        ),
        ('{"prompt": "a", "answer": ""}', "has no answer"),
        ('{"messages": 3}', "has 'messages' that are no list"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "role 'tool'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no answer"),
    ],
)
def test_errors(written, line, words):
    with pytest.raises(UserError, match=words):
        pipeline.prepare(written({"prompt": "a", "answer": "b"}, line))


def test_problems():
    root = config_lib.Config()
    found = Instructions(path="", user="none").problems("config.data.source", root)
    assert [one.split(":")[0] for one in found] == [
        "config.data.source.path=''",
        "config.data.source.user='none'",
    ]
