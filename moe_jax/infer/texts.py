"""Text in, text out: prompts through a tokenizer and a decoder."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.infer import generate
from moe_jax.infer.generate import Sampling
from moe_jax.parallel import rules


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a prompt as the training text had them: begin of document first."""
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    ids = [int(i) for i in tokenizer.encode(prompt.encode("utf-8", "surrogateescape"))]
    begin = [] if first is None else [first]
    if not begin and not ids:
        raise ValueError("an empty prompt needs a tokenizer with a begin of document")
    return begin + ids


def stream(
    parts: Any,
    tokenizer: Any,
    params: Any,
    router_state: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
) -> Iterator[list[list[int]]]:
    """Yields the new ids of each text since the last time; ends when all have ended.

    The batch is filled up to what the mesh splits evenly; a text ends at the end of
    document. The prompt's own ids are part of what is yielded.
    """
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    shards = rules.size(jax.sharding.get_abstract_mesh(), "batch")
    padded = ids + [ids[0]] * (-len(ids) % shards)
    shortest = min(len(prompt) for prompt in ids)
    yield [prompt[:shortest] for prompt in ids]
    ended = np.zeros(len(ids), bool)
    for position, column in enumerate(
        generate.stream(
            parts.model,
            params,
            router_state,
            padded,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            vocab_size=tokenizer.vocab_size,
        ),
        start=shortest,
    ):
        new = column[: len(ids)]
        given = position < np.array([len(prompt) for prompt in ids])
        ended |= ~given & (new == tokenizer.eos_id)
        yield [[] if end else [int(i)] for end, i in zip(ended, new, strict=True)]
        if ended.all():
            return


def write(parts: Any, tokenizer: Any, params, router_state, prompts, **options):
    """The texts of `stream` whole, one str each, prompts included."""
    texts: list[list[int]] = [[] for _ in prompts]
    for new in stream(parts, tokenizer, params, router_state, prompts, **options):
        for text, ids in zip(texts, new, strict=True):
            text.extend(ids)
    return [tokenizer.decode(ids).decode("utf-8", "replace") for ids in texts]
