"""The compressors against slow ones."""

import collections
import gzip
import math
import random

import pytest

from moe_jax.data import baselines
from moe_jax.errors import UserError


def slow_order2(train, heldout):
    follows = collections.defaultdict(collections.Counter)
    for document in train:
        for i, byte in enumerate(document):
            for order in range(min(i, 2) + 1):
                follows[document[i - order : i]][byte] += 1

    def probability(context, byte):
        shorter = probability(context[1:], byte) if context else 1 / 256
        seen = follows[context]
        if not seen:
            return shorter
        return (seen[byte] + len(seen) * shorter) / (sum(seen.values()) + len(seen))

    bits = -sum(
        math.log2(probability(document[max(0, i - 2) : i], byte))
        for document in heldout
        for i, byte in enumerate(document)
    )
    return bits / sum(map(len, heldout))


def random_documents(rng, count, alphabet):
    return [bytes(rng.choices(alphabet, k=rng.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("batch_bytes", [1, 40, 1 << 20])
def test_order2_matches_dictionary(monkeypatch, batch_bytes):
    # Small parts, so that documents meet the borders between them.
    monkeypatch.setattr(baselines, "_BATCH_BYTES", batch_bytes)
    rng = random.Random(batch_bytes)
    train = random_documents(rng, 8, b"aab\x00")
    heldout = random_documents(rng, 8, b"abc\xff")
    got = baselines.order2_bits_per_byte(train, heldout)
    assert got == pytest.approx(slow_order2(train, heldout), rel=1e-12)


def test_order2_without_training_text_is_uniform():
    assert baselines.order2_bits_per_byte([], [b"abc"]) == pytest.approx(8)


def test_gzip_matches_module():
    documents = [b"some text " * 20, b"", b"and more"]
    want = 8 * len(gzip.compress(b"".join(documents), 9)) / 208
    assert baselines.gzip_bits_per_byte(iter(documents)) == want


@pytest.mark.parametrize("documents", [[], [b"", b""]])
def test_no_text(documents):
    with pytest.raises(UserError, match="no held-out text"):
        baselines.gzip_bits_per_byte(documents)
    with pytest.raises(UserError, match="no held-out text"):
        baselines.order2_bits_per_byte([b"abc"], documents)
