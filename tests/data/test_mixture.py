"""Mixtures: exact shares, each row of each source once in each of its passes."""

import collections
import itertools
import json
import math

import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import config_json
from moe_jax.data import order, pipeline, sources
from moe_jax.errors import UserError

WEIGHTS = ((1,), (1, 1), (7, 3), (5, 3, 1), (1, 1, 13), (4, 2), (2, 3, 5, 7))


def slow_stream(sizes, weights, seed):
    """What `Stream` should give, one element after the other, with all that is past."""
    weights = [w // math.gcd(*weights) for w in weights]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    alone = [order.Stream([size], [1], order._seed(seed, i)) for i, size in
             enumerate(sizes)]  # fmt: skip
    taken = [0] * len(sizes)
    for n in itertools.count(1):
        lags = [w * n / sum(weights) - t for w, t in zip(weights, taken, strict=True)]
        chosen = max(range(len(sizes)), key=lambda i: (round(lags[i], 9), -i))
        yield firsts[chosen] + alone[chosen][taken[chosen]]
        taken[chosen] += 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_stream_is_that_of_the_slow_oracle(weights):
    sizes = [20 + 11 * i for i in range(len(weights))]
    stream = order.Stream(sizes, weights, seed=5)
    want = list(itertools.islice(slow_stream(sizes, weights, 5), 80))
    assert [stream[n] for n in range(80)] == want


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_exact(weights):
    turns = order.rhythm(weights)
    assert np.bincount(turns).tolist() == list(weights)
    so_far = np.array([np.cumsum(turns == i) for i in range(len(weights))])
    due = np.outer(weights, np.arange(1, len(turns) + 1)) / sum(weights)
    assert np.max(so_far - due) < 1, "none is a whole turn ahead"
    assert np.max(due - so_far) < max(1, len(weights) - 1)


def test_each_source_once_in_each_of_its_passes_and_in_another_order():
    stream = order.Stream([5, 12], [3, 1], seed=1)
    taken = [stream[n] for n in range(4 * 24)]
    first, second = ([r for r in taken if (r < 5) is low] for low in (True, False))
    passes = [first[i : i + 5] for i in range(0, 70, 5)]
    assert all(sorted(p) == list(range(5)) for p in passes)
    assert len({tuple(p) for p in passes}) > 10
    assert sorted(second[:12]) == sorted(second[12:24]) == list(range(5, 17))
    assert second[:12] != second[12:24]


def test_sources_of_one_size_have_orders_of_their_own():
    stream = order.Stream([50, 50, 50], [1, 1, 1], seed=1)
    taken = np.array([stream[n] for n in range(90)])
    orders = {tuple(taken[i::3] - 50 * i) for i in range(3)}
    assert len(orders) == 3 and all(max(order) < 50 for order in orders)


def test_a_single_source_keeps_the_order_it_had():
    import grain

    alone = grain.MapDataset.range(40).seed(9).shuffle().repeat()
    stream = order.Stream([40], [1], 9)
    assert [stream[n] for n in range(90)] == [alone[n] for n in range(90)]


def test_late_element_needs_none_before():
    stream = order.Stream([5, 12], [3, 1], seed=1)
    assert 0 <= stream[10**15] < 17


@pytest.mark.parametrize("sizes", [[3], [4, 9, 1], [0, 5], [5, 0]])
def test_spread_has_all_rows_once_and_evenly(sizes):
    spread = [int(i) for i in order.spread(sizes)]
    assert sorted(spread) == list(range(sum(sizes)))
    begin = 0
    for size in sizes:
        places = [spread.index(row) for row in range(begin, begin + size)]
        assert places == sorted(places)
        if size > 1 and len(sizes) > 1:
            assert places[0] <= sum(sizes) / size, "it comes early"
        begin += size


@pytest.fixture
def mixture(corpus, tmp_path):
    """Letters and digits, in the shares 3 to 1; the digits are far less."""
    digits = tmp_path / "digits"
    digits.mkdir()
    for number in range(9):
        (digits / f"{number}.txt").write_text(f"{number}" * (30 + number))
    return sources.Mixture(
        sources=(
            sources.TextFiles(path=str(corpus)),
            sources.TextFiles(path=str(digits)),
        ),
        weights=(3, 1),
    )


@pytest.fixture
def mixed(mixture, make_config):
    return pipeline.prepare(make_config(mixture))


def alone(mixture, make_config, index):
    return pipeline.prepare(make_config(mixture.sources[index]))


def test_rows_are_those_of_the_sources(mixed, mixture, make_config):
    parts = [alone(mixture, make_config, i) for i in range(2)]
    for split in ("train", "validation"):
        counts = [part.num_rows(split) for part in parts]
        assert mixed.num_rows(split) == sum(counts)
        assert mixed.bytes_in(split) == sum(part.bytes_in(split) for part in parts)
        want = [
            part.row(split, n) for part in parts for n in range(part.num_rows(split))
        ]
        numbers = np.random.default_rng(0).permutation(sum(counts)).tolist()
        got = mixed.rows(split, [*numbers, sum(counts) + 1, sum(counts) + 7])
        for name, value in got.items():
            for place, number in enumerate(numbers):
                np.testing.assert_array_equal(value[place], want[number][name])
            assert not value[-2:].any(), "past the last is padding"
    assert [s.split("(")[0] for s, _ in mixed.source_rows("train")] == ["TextFiles"] * 2
    line = mixed.describe()
    assert "75.0% TextFiles(" in line and "25.0% TextFiles(" in line


@pytest.mark.parametrize("count", [1, 2, 4])
def test_batches_do_not_depend_on_processes_or_where_one_begins(mixed, count):
    given = {"batch_size": 8, "seed": 3}
    whole = list(mixed.train_batches(**given, start_step=0, num_steps=30))
    parts = [
        mixed.train_batches(
            **given, start_step=11, num_steps=19, rows=(i * 8 // count, 8 // count)
        )
        for i in range(count)
    ]
    for want, *got in zip(whole[11:], *parts, strict=True):
        for name in want:
            joined = np.concatenate([batch[name] for batch in got])
            np.testing.assert_array_equal(joined, want[name])


def test_shares_of_rows_in_batches(mixed):
    batches = mixed.train_batches(batch_size=8, seed=3, start_step=0, num_steps=25)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    is_digits = ((tokens >= ord("0")) & (tokens <= ord("9"))).any(axis=1)
    assert is_digits.sum() == 8 * 25 / 4


def test_held_out_is_every_row_once_and_a_part_sees_both(mixed):
    batches = list(mixed.eval_batches(batch_size=4))
    scored = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    eos = mixed.tokenizer.eos_id
    want = [t for text in mixed.documents("validation") for t in [*text, eos]]
    assert collections.Counter(scored.tolist()) == collections.Counter(want)
    (first,) = mixed.eval_batches(batch_size=4, max_batches=1)
    kinds = {chr(t).isdigit() for t in first["tokens"][:, 5].tolist() if t < 256}
    assert kinds == {True, False}


def test_bytes_per_token_is_of_what_is_seen(mixed, mixture, make_config):
    """The share of a row's tokens that are bytes, three rows of letters to one."""
    shares = []
    for index in range(2):
        part = alone(mixture, make_config, index)
        tokens = part.rows("train", range(part.num_rows("train")))["tokens"]
        shares.append((tokens < 256).mean())
    seen = (3 * shares[0] + shares[1]) / 4
    assert mixed.bytes_per_token("train") == pytest.approx(seen, rel=0.02)
    assert mixed.bytes_per_token("validation") == (
        mixed.bytes_in("validation") / mixed.tokens_in("validation")
    )


def test_what_was_read_has_a_name(mixed):
    """Numbers that a batch was read by, found again in the sources' documents."""
    (batch,) = mixed.train_batches(
        batch_size=12, seed=3, start_step=2, num_steps=1, numbered=True
    )
    numbers = batch.pop("row")
    np.testing.assert_array_equal(
        batch["tokens"], mixed.rows("train", numbers)["tokens"]
    )
    found = mixed.identify(numbers)
    assert np.bincount(found["source"]).tolist() == [9, 3]
    texts = [list(part.documents("train")) for part in mixed.parts]
    entries = zip(batch["tokens"], *found.values(), strict=True)
    for tokens, source, row, (first, last) in entries:
        assert row < mixed.parts[source].num_rows("train")
        documents = b"".join(texts[source][first : last + 1])
        assert bytes(t for t in tokens if t < 256) in documents


def test_content_hash_has_all_sources_and_weights(mixture, make_config, tmp_path):
    def content_hash(**changes):
        made = {"sources": mixture.sources, "weights": mixture.weights} | changes
        return pipeline.prepare(make_config(sources.Mixture(**made))).content_hash

    seen = {content_hash(), content_hash(weights=(1, 3))}
    seen.add(content_hash(sources=mixture.sources[::-1]))
    (tmp_path / "digits" / "4.txt").write_text("4" * 35)
    seen.add(content_hash())
    assert len(seen) == 4
    tokens = list((tmp_path / "cache" / "tokens").glob("*/manifest.json"))
    assert len(tokens) == 3, "each source is prepared once, whatever the mixture"


def test_instructions_and_text_together(corpus, make_config, tmp_path):
    pairs = [{"prompt": f"{i}", "answer": "y" * i} for i in range(1, 20)]
    lines = [json.dumps(pair) for pair in pairs]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    source = sources.Mixture(
        sources=(
            sources.Instructions(path=str(tmp_path / "chats.jsonl")),
            sources.TextFiles(path=str(corpus)),
        ),
        weights=(1, 1),
    )
    data = pipeline.prepare(make_config(source, sequence_length=64))
    assert not data.all_scored
    (batch,) = data.train_batches(batch_size=6, seed=0, start_step=0, num_steps=1)
    assert batch["weights"][::2].mean() < batch["weights"][1::2].mean()


def test_config_goes_through_json_and_names_what_changed(mixture, make_config):
    config = make_config(mixture)
    back = config_json.from_json(config_json.to_json(config))
    assert back.data.source == mixture
    back.data.source.weights = (1, 3)
    (line,) = config_json.differences(config, back)
    assert line == "config.data.source.weights: (3, 1) -> (1, 3)"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sources": (), "weights": ()}, "sources=(): must hold at least one"),
        ({"weights": (3,)}, "weights=(3,): must hold one weight a source, 2"),
        ({"weights": (3, 0)}, "must be whole numbers from 1"),
        ({"weights": (0.7, 0.3)}, "as (7, 3) for 0.7 and 0.3"),
        ({"weights": (99_999, 2)}, "their sum must be at most 100,000"),
        ({"sources": (sources.Mixture(), "x")}, "sources[1]=str: must be a source"),
        ({"sources": (sources.Mixture(), "x")}, "sources[0]=Mixture: must be a source"),
        (
            {"sources": (sources.TextFiles(), sources.PythonSource())},
            "config.data.source.sources[0].path='': must name",
        ),
    ],
)
def test_rules(mixture, make_config, changes, words):
    for name, value in changes.items():
        setattr(mixture, name, value)
    config = make_config(mixture)
    found = "\n".join(config_lib.all_problems(config.data, "config.data", config))
    assert words in found


def test_a_source_shorter_than_a_row_is_named(mixture, make_config, tmp_path):
    (tmp_path / "one.txt").write_text("abc")
    few = sources.TextFiles(path=str(tmp_path / "one.txt"))
    mixture.sources = (mixture.sources[0], few)
    with pytest.raises(
        UserError, match=r"text of TextFiles\(.*one.txt\) has \d tokens"
    ):
        pipeline.prepare(make_config(mixture))
