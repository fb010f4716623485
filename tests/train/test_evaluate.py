"""Held-out figures against slow sums, and what marks an expert."""

import math

import jax
import numpy as np
import pytest

from moe_jax.check.rows import random_batch
from moe_jax.models.base import TokenInputs
from moe_jax.moe.routing import Mode
from moe_jax.train import setup
from moe_jax.train.evaluate import Evaluator, typical_tokens

BYTES_PER_TOKEN = 1.5


class Text:
    """Three batches of 8 rows of which the last holds 3."""

    def __init__(self, config):
        self.batches = []
        for number in range(3):
            config.seed = number
            self.batches.append(random_batch(config, "float32"))
        for array in self.batches[2].values():
            array[3:] = 0

    def eval_batches(self, *, batch_size, max_batches, rows):
        first, count = rows
        for batch in self.batches[: max_batches or None]:
            yield {n: v[first : first + count] for n, v in batch.items()}

    def bytes_in(self, split):
        assert split == "validation"
        return 1000


class NoText:
    def eval_batches(self, **_):
        return iter(())


@pytest.fixture(scope="module")
def text(make_tiny):
    return Text(make_tiny())


@pytest.fixture(scope="module")
def parts(make_tiny):
    return setup.make_parts(make_tiny(data=2, expert=2, tensor=2))


@pytest.fixture(scope="module")
def state(parts):
    return setup.fresh_state(parts)


@pytest.fixture(scope="module")
def evaluator(parts):
    return Evaluator(parts, BYTES_PER_TOKEN)


@pytest.fixture(scope="module")
def slow(make_tiny, text, state):
    """Per batch, on one device: nats of each token (B, S), and the routing."""
    one = setup.make_parts(make_tiny(), jax.devices()[:1])
    state = jax.device_get(state)

    @jax.jit
    def outputs(batch):
        names = ("tokens", "positions", "segments")
        hidden, _, aux = one.model.apply(
            state.all_params,
            state.router_state,
            TokenInputs(**{n: batch[n] for n in names}),
            key=None,
            mode=Mode(train=False, capture=True),
        )
        return one.model.logits(state.all_params, hidden), aux.routing

    found = []
    for batch in text.batches:
        logits, routing = jax.device_get(outputs(batch))
        logits = np.float64(logits)
        nats = np.zeros(logits.shape[:2])
        for place in np.ndindex(*nats.shape):
            normaliser = np.log(np.sum(np.exp(logits[place])))
            nats[place] = normaliser - logits[place][batch["targets"][place]]
        found.append((nats, routing))
    return found


@pytest.mark.parametrize("max_batches", [0, 1, 2])
def test_score_is_a_slow_sum(evaluator, state, text, slow, max_batches):
    figures = evaluator.score(state, text, max_batches)
    taken = max_batches or 3
    pairs = list(zip(text.batches, slow, strict=True))[:taken]
    nats = sum(np.sum(b["weights"] * nll) for b, (nll, _) in pairs)
    tokens = sum(int(b["weights"].sum()) for b, _ in pairs)
    assert figures["tokens"] == tokens
    assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    size = tokens * BYTES_PER_TOKEN if max_batches else 1000
    assert figures["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / size, rel=1e-5
    )
    assert figures["drops"] == 0 and figures["drop_fraction"] == 0


def test_padding_rows_do_not_count(text):
    """The stand-in is what the test above needs: most of its last batch is empty."""
    assert not text.batches[2]["weights"][3:].any()
    assert text.batches[2]["weights"][:3].any()


def test_no_held_out_text(evaluator, state):
    assert evaluator.score(state, NoText()) == {}
    assert evaluator.expert_uses(state, NoText()) is None


def test_expert_uses_are_a_slow_count(evaluator, state, text, slow):
    uses_lev = evaluator.expert_uses(state, text)
    expected = np.zeros((2, 4, 264), int)
    for batch, (_, routing) in zip(text.batches, slow, strict=True):
        ids = batch["tokens"].reshape(-1)
        for layer, t, k in np.ndindex(*routing.expert_tk.shape):
            if routing.valid_tk[layer, t, k]:
                expected[layer, routing.expert_tk[layer, t, k], ids[t]] += 1
    np.testing.assert_array_equal(uses_lev, expected)
    valid = sum(int((b["segments"] > 0).sum()) for b in text.batches)
    assert uses_lev.sum() == 2 * 2 * valid


def test_typical_tokens_by_hand():
    uses_lev = np.array([[[8, 2, 0, 0], [8, 0, 6, 0]]])
    # Expert 0: P(v|e) = .8 .2 0 0, expert 1: 8/14 0 6/14 0; all: 16 2 6 0 of 24.
    # Scores n log(P(v|e) / P(v)): 8 log 1.2 = 1.46 and 2 log 2.4 = 1.75;
    # 8 log 0.857 < 0 and 6 log 1.71 = 3.2.
    found = typical_tokens(uses_lev, top=3)
    np.testing.assert_array_equal(found, [[[1, 0, -1], [2, -1, -1]]])


def test_typical_tokens_of_an_expert_that_is_never_used():
    uses_lev = np.array([[[0, 0, 0], [1, 2, 3]]])
    np.testing.assert_array_equal(typical_tokens(uses_lev), np.full((1, 2, 3), -1))
