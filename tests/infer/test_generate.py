"""Sampling by hand; a cache, a batch and uneven prompts that change nothing."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.infer import generate, texts
from moe_jax.infer.generate import Sampling, filter_logits, sample
from moe_jax.models.base import TokenInputs
from moe_jax.models.decoder import DecoderModel
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import EVAL

PROBS = np.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]])


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (dict(top_k=1), [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (dict(top_k=3), [[0, 1, 1, 1], [1, 1, 1, 1]]),  # Row 1: a tie for the third.
        (dict(top_k=9), [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (dict(top_p=0.35), [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (dict(top_p=0.65), [[0, 1, 0, 1], [1, 0, 0, 0]]),
        (dict(top_p=0.85), [[0, 1, 1, 1], [1, 1, 1, 0]]),
        # The shares of two are 4/7 and 3/7, so that one alone reaches a half.
        (dict(top_k=2, top_p=0.5), [[0, 1, 0, 0], [1, 0, 0, 0]]),
    ],
)
def test_filters_by_hand(fields, kept):
    logits = jnp.log(jnp.asarray(PROBS, jnp.float32))
    found = np.asarray(filter_logits(logits, Sampling(**fields)))
    np.testing.assert_array_equal(np.isfinite(found), np.array(kept, bool))
    np.testing.assert_allclose(found[np.isfinite(found)], logits[np.isfinite(found)])


def test_draws_have_the_probabilities_asked_for():
    logits = jnp.tile(jnp.log(jnp.asarray(PROBS[:1], jnp.float32)), (20000, 1))
    shares = lambda sampling: (
        np.bincount(sample(logits, jax.random.key(0), sampling), minlength=4) / 20000
    )
    np.testing.assert_allclose(shares(Sampling()), PROBS[0], atol=0.015)
    # Temperature a half squares the probabilities.
    squares = PROBS[0] ** 2 / (PROBS[0] ** 2).sum()
    np.testing.assert_allclose(shares(Sampling(temperature=0.5)), squares, atol=0.015)
    found = shares(Sampling(top_k=2))
    np.testing.assert_allclose(found, [0, 4 / 7, 0, 3 / 7], atol=0.015)
    np.testing.assert_array_equal(shares(Sampling(temperature=0)), [0, 1, 0, 0])


V, LONGEST = 24, 16


@pytest.fixture(scope="module")
def made():
    model = DecoderModel(
        Decoder(
            vocab_size=V,
            num_layers=2,
            d_model=16,
            num_heads=2,
            feed_forward=MoE(num_experts=4, experts=ExpertFeedForward(d_ff=8)),
            dtype="float32",
            remat="none",
        )
    )
    rng = np.random.default_rng(7)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.6, leaf.dtype)
    params = jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))
    return model, params, model.init_router_state()


@pytest.fixture(scope="module")
def greedy_by_hand(made):
    """The most likely token after each whole text, without a cache."""
    model, params, state = made

    @jax.jit
    def logits(tokens, length):
        inputs = TokenInputs(
            tokens=tokens,
            positions=jnp.arange(LONGEST)[None],
            segments=(jnp.arange(LONGEST) < length)[None].astype(jnp.int32),
        )
        hidden = model.apply(params, state, inputs, key=None, mode=EVAL)[0]
        return model.logits(params, hidden)[0]

    def roll(prompt, count, limit=V):
        text = list(prompt)
        for _ in range(count):
            padded = np.zeros((1, LONGEST), np.int32)
            padded[0, : len(text)] = text
            last = np.asarray(logits(padded, len(text)))[len(text) - 1]
            text.append(int(np.argmax(last[:limit])))
        return text

    return roll


GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [2, 7], [11, 8, 2, 8]]


def test_greedy_is_the_rollout_without_a_cache(made, greedy_by_hand):
    texts = generate.generate(*made, PROMPTS, max_new_tokens=6, sampling=GREEDY)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        # All end where the longest does; a short prompt's text begins earlier.
        assert len(text) == 7 + 6 and text[: len(prompt)] == prompt
        assert text == greedy_by_hand(prompt, 13 - len(prompt))
    assert len({tuple(t[7:]) for t in texts}) > 1


def test_ids_beyond_the_vocabulary_are_never_drawn(made, greedy_by_hand):
    free = greedy_by_hand(PROMPTS[0], 6)[7:]
    limit = max(free)
    (text,) = generate.generate(
        *made, PROMPTS[:1], max_new_tokens=6, sampling=GREEDY, vocab_size=limit
    )
    assert text == greedy_by_hand(PROMPTS[0], 6, limit) and max(text[7:]) < limit
    assert text[7:] != free


def test_the_seed_decides(made):
    run = lambda seed: generate.generate(
        *made,
        PROMPTS[:1] * 3,
        max_new_tokens=6,
        sampling=Sampling(temperature=1.5),
        seed=seed,
    )
    first = run(0)
    assert first == run(0) != run(1)
    assert len({tuple(text) for text in first}) > 1


def test_prompts_need_a_token(made):
    for prompts in ([[]], []):
        with pytest.raises(ValueError, match="at least one token"):
            next(generate.stream(*made, prompts, max_new_tokens=1, sampling=GREEDY))


BEGIN = 20


class Letters:
    """Ids are letters; the id of the end is set by the test."""

    vocab_size = V

    def __init__(self, eos_id, bos_id=BEGIN):
        self.eos_id, self.bos_id = eos_id, bos_id

    def encode(self, data):
        return [c - 97 for c in data]

    def decode(self, ids):
        return bytes(i + 97 for i in ids)


@pytest.mark.parametrize("sizes", [None, dict(data=4), dict(data=2, context=2)])
def test_a_text_stops_at_the_end_of_document(made, greedy_by_hand, axes_mesh, sizes):
    """Alone, and on a mesh that splits more rows than there are texts."""
    model, params, state = made
    prompts = ["bcd", "dddhi"]
    ids = [[BEGIN, *Letters(0).encode(p.encode())] for p in prompts]
    news = [greedy_by_hand(i, 14 - len(i))[len(i) :] for i in ids]
    both = [i for i in news[0][1:-1] if i in news[1][1:-1]]
    assert both, "no id ends both texts: draw other weights"
    eos_id = both[0]
    tokenizer = Letters(eos_id)
    parts = types.SimpleNamespace(model=model)
    options = dict(max_new_tokens=8, sampling=GREEDY)
    want = [
        tokenizer.decode([*i, *new[: new.index(eos_id)]]).decode()
        for i, new in zip(ids, news, strict=True)
    ]
    inputs = (parts, tokenizer, params, state, prompts)
    with jax.set_mesh(axes_mesh(**sizes)) if sizes else contextlib.nullcontext():
        assert texts.write(*inputs, **options) == want
        pieces = list(texts.stream(*inputs, **options))
    # It ends as soon as the last text has ended.
    ends = [len(i) + new.index(eos_id) for i, new in zip(ids, news, strict=True)]
    assert len(pieces) == 1 + max(ends) + 1 - 4
    assert pieces[-1][int(np.argmax(ends))] == []


def test_a_prompt_begins_as_a_document_does():
    tokenizer = Letters(5, bos_id=None)
    assert texts.encode_prompt(tokenizer, "bc") == [5, 1, 2]
    tokenizer.bos_id = 9
    assert texts.encode_prompt(tokenizer, "bc") == [9, 1, 2]
    assert texts.encode_prompt(tokenizer, "") == [9]
    tokenizer.bos_id = tokenizer.eos_id = None
    assert texts.encode_prompt(tokenizer, "bc") == [1, 2]
    with pytest.raises(ValueError, match="empty prompt"):
        texts.encode_prompt(tokenizer, "")


def test_an_end_of_document_within_a_prompt_does_not_end_it(made, greedy_by_hand):
    model, params, state = made
    tokenizer = Letters(eos_id=7)
    ids = [texts.encode_prompt(tokenizer, prompt) for prompt in ("bcd", "bcdhc")]
    assert 7 in ids[1]
    want = []
    for given in ids:
        new = greedy_by_hand(given, 14 - len(given))[len(given) :]
        want.append(given + new[: (*new, 7).index(7)])
    found = texts.write(
        types.SimpleNamespace(model=model),
        tokenizer,
        params,
        state,
        ["bcd", "bcdhc"],
        max_new_tokens=8,
        sampling=GREEDY,
    )
    assert found == [tokenizer.decode(text).decode() for text in want]
