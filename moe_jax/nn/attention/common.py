"""What the attentions share: who sees whom, what becomes of scores, names."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.nn import module
from moe_jax.tree import struct

# A rematerialisation policy that saves this name does not attend again: it stands on
# the output and on the log-sum-exp of the scores, all that a derivative needs.
ATTENDED = "attended"
# On queries, keys and values, before they are normed and turned.
PROJECTED = "projected"


@struct
class Segments:
    """Documents of the rows, from which follows who sees whom.

    A query sees the keys of its own document, with causality those that do not come
    later in the row. So it always sees itself, padding too.

    Attributes:
      queries: (B, S) int32, document of each query; padding is one too.
      keys: (B, M) int32, those of the whole row.
      first: () int32, place of the first query in the row.
    """

    queries: jax.Array
    keys: jax.Array
    first: jax.Array | int = 0

    def mask(self, scoring: "Scoring") -> jax.Array:
        """(B, S, M) bool: which query sees which key."""
        query_places = self.first + jnp.arange(self.queries.shape[1])
        key_places = jnp.arange(self.keys.shape[1])
        same = self.queries[:, :, None] == self.keys[:, None, :]
        if not scoring.causal:
            return same
        return same & in_reach(query_places[:, None], key_places, scoring.window)


def in_reach(query: jax.Array, key: jax.Array, window: int) -> jax.Array:
    """Whether a key is not later than a query, nor before its window (0: none)."""
    seen = query >= key
    return seen & (query - key < window) if window else seen


@struct(static=("window", "softcap", "causal"))
class Scoring:
    """What an attention does beyond the plain softmax.

    Attributes:
      causal: a query sees no key that comes later in the row; else all of its document.
      window: a query sees at most that many positions, itself included (Child et al.
        2019, Mistral 7B); 0: all before it.
      softcap: scores become softcap * tanh(scores / softcap) (Gemma 2); 0: they stay.
      sinks: (H,) a score a head that takes part in the softmax and brings no value
        (GPT-OSS; Xiao et al. 2023, arXiv:2309.17453); or None.
    """

    window: int = 0
    softcap: float = 0.0
    sinks: jax.Array | None = None
    causal: bool = True

    def __post_init__(self):
        if self.window and not self.causal:
            raise ValueError(
                f"window={self.window} reaches back from a query, so it needs causal="
                "True; set window=0"
            )


PLAIN = Scoring()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is known of an attention before it runs: its shapes and options.

    Attributes:
      queries: positions of a row on one shard.
      keys: positions of the whole row.
      width: of a query and a key.
      value_width: of a value.
      dtype: of the computation.
      window: see `Scoring`.
      softcap: see `Scoring`.
      sinks: whether there are any.
      causal: see `Scoring`.
    """

    queries: int
    keys: int
    width: int
    value_width: int
    dtype: Any
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    causal: bool = True

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring) -> "Call":
        """The call with these arguments; see `ATTENTIONS`."""
        return cls(
            queries=q.shape[1],
            keys=k.shape[1],
            width=q.shape[-1],
            value_width=v.shape[-1],
            dtype=q.dtype,
            window=scoring.window,
            softcap=scoring.softcap,
            sinks=scoring.sinks is not None,
            causal=scoring.causal,
        )


def mean_seen(length: int, window: int = 0, causal: bool = True) -> float:
    """Keys that a query sees on average in rows of one document, causality halved."""
    if not causal:
        return float(length)
    reach = min(window or length, length)
    return reach * (1 - reach / (2 * length))


def masked_out(dtype: jax.typing.DTypeLike) -> float:
    """The score of a key that is not seen.

    A finite number: where nothing is seen yet, -inf - -inf would be NaN.
    """
    return -0.7 * float(jnp.finfo(dtype).max)


def score_dtype(q: jax.Array) -> jnp.dtype:
    """Type of scores and softmax: float32, or float64 where the queries are."""
    return module.accumulation_dtype(q.dtype)
