"""A run that moves over hosts reads each row once in a pass, whatever the data."""

import collections
import json

import numpy as np
import pytest

from moe_jax.data import pipeline, sources
from moe_jax.data.images.sources import ImageFiles
from moe_jax.observe import ledger

# Hosts, first step, last step, and the step at which they were killed.
STAGES = ((4, 0, 6, 9), (2, 6, 8, 8), (1, 8, 15, 17), (4, 15, 30, 30))
BATCH, SEED = 8, 4


@pytest.fixture
def configs(corpus, make_config, make_images, npz_file, tmp_path):
    pairs = [{"prompt": f"{i}", "answer": "y" * (i % 7 + 1)} for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    plain = sources.TextFiles(path=str(corpus))
    chats = str(tmp_path / "chats.jsonl")
    packed = sources.Instructions(path=chats, user="{}=", assistant="{}")
    mixed = sources.Mixture(sources=(plain, packed), weights=(2, 1))
    found = {"plain": plain, "packed": packed, "mixed": mixed}
    made = {k: make_config(v, sequence_length=32) for k, v in found.items()}
    return made | {"images": make_images(ImageFiles(path=str(npz_file)))}


def read(data, folder, count, begin, end):
    """The batches that so many processes read, side by side."""
    size, parts = BATCH // count, []
    ledger.cut_back(folder, begin)
    for process in range(count):
        batches = data.train_batches(
            batch_size=BATCH,
            seed=SEED,
            start_step=begin,
            num_steps=end + 5 - begin,  # more than is taken
            rows=(process * size, size),
            numbered=True,
        )
        taken = ledger.recorded(
            batches, folder, process, begin, process * size, data.identify
        )
        parts.append([next(taken) for _ in range(begin, end)])
    for step in zip(*parts, strict=True):
        yield {k: np.concatenate([part[k] for part in step]) for k in step[0]}


@pytest.mark.parametrize("kind", ["plain", "packed", "mixed", "images"])
def test_four_two_one_four_hosts(configs, kind, tmp_path):
    data = pipeline.prepare(configs[kind])
    trained = []
    for count, begin, end, killed in STAGES:
        batches = list(read(data, tmp_path, count, begin, killed))
        trained += batches[: end - begin]  # the last checkpoint is of step `end`

    given = dict(batch_size=BATCH, seed=SEED, start_step=0, num_steps=30)
    for got, want in zip(trained, data.train_batches(**given), strict=True):
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])

    # Counted here, from the lines themselves, and not by `ledger.passes`.
    steps = ledger.read(tmp_path)
    assert list(steps) == list(range(1, 31))
    in_order = [entry for step in steps.values() for entry in step]
    assert len(in_order) == 30 * BATCH
    content = "images" if kind == "images" else "tokens"
    rows = np.concatenate([batch[content] for batch in trained])
    sizes = [size for _, size in data.source_rows("train")]
    seen = [[] for _ in sizes]
    for entry, row in zip(in_order, rows, strict=True):
        source = entry.get("source", 0)
        seen[source].append(entry["row"])
        if kind != "images":  # What is written is what was trained on.
            want = data.parts[source].rows("train", [entry["row"]])["tokens"][0]
            np.testing.assert_array_equal(row, want)
    for numbers, size in zip(seen, sizes, strict=True):
        assert len(numbers) > 2 * size, "passes are crossed"
        for begin in range(0, len(numbers) - size + 1, size):
            one_pass = collections.Counter(numbers[begin : begin + size])
            assert one_pass == collections.Counter(range(size))
