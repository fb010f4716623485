"""Routings from even to all tokens on one expert, which a dispatch has to stand.

Each pattern is `(sizes, rng) -> (expert_tk, valid_tk)`. Valid experts of a token are
distinct; where a choice is not valid, its expert is an arbitrary one.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

Choices = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a pattern is made for.

    Attributes:
      tokens: T, over the whole mesh; a shard holds a block of consecutive ones.
      top_k: K.
      num_experts: E.
      token_shards: over which T is split.
      expert_shards: over which E is split.
    """

    tokens: int
    top_k: int
    num_experts: int
    token_shards: int = 1
    expert_shards: int = 1


Pattern = Callable[[Sizes, np.random.Generator], Choices]


def _in_turn(sizes: Sizes, turn_t: np.ndarray, pool: np.ndarray) -> Choices:
    """Experts of `pool` in a circle: turn n takes the places n K, n K + 1, ...

    A pool that is smaller than K serves a token once with each of its experts.
    """
    k = np.arange(sizes.top_k)[None, :]
    width = min(sizes.top_k, len(pool))
    expert_tk = pool[(turn_t[:, None] * width + k) % len(pool)]
    valid_tk = np.broadcast_to(k < width, expert_tk.shape)
    other_tk = (np.arange(sizes.tokens)[:, None] + k) % sizes.num_experts
    return np.where(valid_tk, expert_tk, other_tk), valid_tk


def _drawn(sizes: Sizes, rng: np.random.Generator, share_e: np.ndarray) -> Choices:
    """K distinct experts a token, one after the other, in proportion to shares.

    The K largest of logarithms with Gumbel noise are such a draw.
    """
    noise_te = rng.gumbel(size=(sizes.tokens, sizes.num_experts))
    return _largest(sizes, noise_te + np.log(share_e))


def _largest(sizes: Sizes, score_te: np.ndarray) -> Choices:
    expert_tk = np.argsort(-score_te, axis=1, kind="stable")[:, : sizes.top_k]
    return expert_tk, np.ones(expert_tk.shape, bool)


def balanced(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """Every expert as often as any other, from every shard."""
    return _in_turn(sizes, np.arange(sizes.tokens), np.arange(sizes.num_experts))


def uniform(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """Every token draws its experts with even chances."""
    return _drawn(sizes, rng, np.ones(sizes.num_experts))


def zipf(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """Chances fall as 1 / rank."""
    return _drawn(sizes, rng, 1 / np.arange(1, sizes.num_experts + 1))


def steep_zipf(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """Chances fall as 1 / rank^2."""
    return _drawn(sizes, rng, 1.0 / np.arange(1, sizes.num_experts + 1) ** 2)


def hot_expert(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """Half of the tokens choose expert 0; all other choices are even."""
    score_te = rng.gumbel(size=(sizes.tokens, sizes.num_experts))
    hot_t = rng.random(sizes.tokens) < 0.5
    score_te[:, 0] = np.where(hot_t, np.inf, -np.inf)
    return _largest(sizes, score_te)


def bursty(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """Runs of tokens, two in a shard, share their experts, as one text may do.

    Over enough runs the load is even; within a shard it is not.
    """
    run = max(1, sizes.tokens // (2 * sizes.token_shards))
    turn_t = np.arange(sizes.tokens) // run
    return _in_turn(sizes, turn_t, np.arange(sizes.num_experts))


def uneven_halves(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """The first half of the tokens share K experts, the second is balanced."""
    place_t = np.arange(sizes.tokens)
    turn_t = np.where(place_t < sizes.tokens // 2, 1, place_t)
    return _in_turn(sizes, turn_t, np.arange(sizes.num_experts))


def hot_shard(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """All choose experts of the first shard, these evenly."""
    pool = np.arange(sizes.num_experts // sizes.expert_shards)
    return _in_turn(sizes, np.arange(sizes.tokens), pool)


def two_experts(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """Two experts serve everybody: each token both, or one of them where K is 1."""
    pool = np.unique(np.array([1, -2]) % sizes.num_experts)
    return _in_turn(sizes, np.arange(sizes.tokens), pool)


def one_expert(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """One expert serves all tokens, each once."""
    pool = np.array([3 % sizes.num_experts])
    return _in_turn(sizes, np.arange(sizes.tokens), pool)


def one_source(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """Only the tokens of the first shard are served: all others are padding."""
    expert_tk, valid_tk = uniform(sizes, rng)
    place_t = np.arange(sizes.tokens)
    return expert_tk, valid_tk & (place_t < sizes.tokens // sizes.token_shards)[:, None]


def holes(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """Two of five choices are not valid, and some shards have none that is."""
    expert_tk, _ = uniform(sizes, rng)
    valid_tk = rng.random(expert_tk.shape) < 0.6
    valid_tk[sizes.tokens // 8 : sizes.tokens // 2] = False
    return expert_tk, valid_tk


def empty(sizes: Sizes, rng: np.random.Generator) -> Choices:
    """No choice is valid."""
    expert_tk, valid_tk = balanced(sizes, rng)
    return expert_tk, np.zeros_like(valid_tk)


PATTERNS: dict[str, Pattern] = {
    "balanced": balanced,
    "uniform": uniform,
    "zipf": zipf,
    "steep_zipf": steep_zipf,
    "hot_expert": hot_expert,
    "bursty": bursty,
    "uneven_halves": uneven_halves,
    "hot_shard": hot_shard,
    "two_experts": two_experts,
    "one_expert": one_expert,
    "one_source": one_source,
    "holes": holes,
    "empty": empty,
}


def make(name: str, sizes: Sizes, seed: int = 0) -> Choices:
    """A pattern by its name: the same for the same sizes and seed.

    Returns:
      expert_tk (T, K) int32 and valid_tk (T, K) bool.
    """
    expert_tk, valid_tk = PATTERNS[name](sizes, np.random.default_rng(seed))
    return expert_tk.astype(np.int32), np.array(valid_tk)


def loads(expert_tk: np.ndarray, valid_tk: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each expert was chosen, (E,)."""
    return np.bincount(expert_tk[valid_tk], minlength=num_experts)
