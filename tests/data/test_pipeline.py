"""Batches: the same for any number of processes, from any step, and complete."""

import collections
import itertools

import numpy as np
import pytest

from moe_jax.data import pipeline, sources
from moe_jax.errors import UserError

TRAIN = {"batch_size": 8, "seed": 3, "start_step": 0, "num_steps": 6}


@pytest.fixture
def text(corpus_config):
    return pipeline.prepare(corpus_config)


def assert_batches_equal(got, want):
    got, want = list(got), list(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def joined(parts):
    """Batches of all processes side by side."""
    for batches in zip(*parts, strict=True):
        yield {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_train_batch_does_not_depend_on_process_count(text, count):
    parts = [
        text.train_batches(**TRAIN, rows=(i * 8 // count, 8 // count))
        for i in range(count)
    ]
    assert_batches_equal(joined(parts), text.train_batches(**TRAIN))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_eval_batch_does_not_depend_on_process_count(text, count):
    parts = [
        text.eval_batches(batch_size=8, rows=(i * 8 // count, 8 // count))
        for i in range(count)
    ]
    assert_batches_equal(joined(parts), text.eval_batches(batch_size=8))


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_resume_equals_skipping(text, prefetch):
    # More rows than the split has, so that both cross an epoch.
    steps = 2 * text.num_rows("train") // 8 + 2
    whole = text.train_batches(**TRAIN | {"num_steps": steps})
    resumed = text.train_batches(
        **TRAIN | {"start_step": 5, "num_steps": steps - 5}, prefetch=prefetch
    )
    assert_batches_equal(resumed, itertools.islice(whole, 5, None))


def test_late_step_is_as_fast_as_early(text):
    batches = text.train_batches(**TRAIN | {"start_step": 10**12, "num_steps": 1})
    assert next(batches)["tokens"].shape == (8, 16)


def test_epoch_has_every_row_once_in_another_order(text):
    count = text.num_rows("train")
    batches = text.train_batches(
        batch_size=1, seed=0, start_step=0, num_steps=2 * count
    )
    rows = [batch["tokens"].tobytes() for batch in batches]
    want = [text.row("train", i)["tokens"].tobytes() for i in range(count)]
    assert collections.Counter(rows[:count]) == collections.Counter(want)
    assert collections.Counter(rows[count:]) == collections.Counter(want)
    assert rows[:count] != rows[count:]
    assert rows[:count] != want


def test_seed_changes_order(text):
    first = next(text.train_batches(**TRAIN))["tokens"]
    other = next(text.train_batches(**TRAIN | {"seed": 4}))["tokens"]
    assert not np.array_equal(first, other)


def test_train_rows_are_full(text):
    for batch in text.train_batches(**TRAIN | {"num_steps": 20}):
        assert batch["segments"].min() > 0


def test_eval_scores_every_heldout_byte_once(text):
    scored = []
    for batch in text.eval_batches(batch_size=8):
        assert batch["tokens"].shape == (8, 16)
        scored += batch["targets"][batch["weights"] > 0].tolist()
    eos = text.tokenizer.eos_id
    want = [t for document in text.documents("validation") for t in [*document, eos]]
    assert scored == want
    assert text.bytes_in("validation") == len(want) - scored.count(eos)


def test_eval_max_batches(text):
    some = text.eval_batches(batch_size=2, max_batches=3)
    every = text.eval_batches(batch_size=2)
    assert_batches_equal(some, itertools.islice(every, 3))


def test_batch_larger_than_split(text):
    batch_size = text.num_rows("train") + 3
    (batch,) = text.train_batches(
        batch_size=batch_size, seed=0, start_step=0, num_steps=1
    )
    assert batch["tokens"].shape == (batch_size, 16)


def test_text_shorter_than_a_row(corpus_config, text):
    tokens = text.tokens_in("train")
    corpus_config.data.sequence_length = tokens + 1
    with pytest.raises(UserError, match=f"set it to at most {tokens} "):
        pipeline.prepare(corpus_config)
    corpus_config.data.sequence_length = tokens
    assert pipeline.prepare(corpus_config).num_rows("train") == 1


def test_without_heldout_text(corpus_config):
    corpus_config.data.validation_fraction = 0.0
    text = pipeline.prepare(corpus_config)
    assert text.num_rows("validation") == text.bytes_in("validation") == 0
    assert list(text.eval_batches(batch_size=4)) == []


def test_python_source_end_to_end(stdlib, make_config):
    text = pipeline.prepare(make_config(sources.PythonSource()))
    for split in ("train", "validation"):
        assert text.bytes_in(split) == sum(map(len, text.documents(split))) > 0
        assert text.tokens_in(split) > text.bytes_in(split)
    assert text.parts[0].manifest["source"]["kind"] == "python_source"
    batch = next(text.train_batches(**TRAIN))
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "tokens": ((8, 16), "int32"),
        "targets": ((8, 16), "int32"),
        "weights": ((8, 16), "float32"),
        "positions": ((8, 16), "int32"),
        "segments": ((8, 16), "int32"),
    }
