"""Attention block by block: no array of all scores, on every platform.

FlashAttention (Dao et al. 2022, arXiv:2205.14135) in plain JAX. A block of queries
passes over blocks of keys with the running maximum and sum of its softmax. The
derivative has the output and the log-sum-exp of each query's scores, and computes a
block's scores again (FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2).

A block of queries leaves out the blocks of keys that come later than all of it, and
those before the first that shares a document with it or is in a window: the loop's
bounds are data. Without causality it leaves out those before the first and after the
last that share a document with it.

Inside, queries of all heads that share a kv head are rows of one matrix: arrays are
(n, B, Hkv, t, Dh) with n blocks of t rows, for queries H / Hkv * block of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe_jax import config
from moe_jax.nn.attention.common import (
    ATTENDED,
    PLAIN,
    Scoring,
    Segments,
    in_reach,
    masked_out,
    score_dtype,
)
from moe_jax.tree import struct


@config.node
class Blocked(config.AttentionConfig):
    """Softmax over blocks of keys; memory grows with the length, not its square.

    Attributes:
      block: queries, and keys, taken at a time. The default suits the caches of CPUs.
    """

    block: int = 64

    def problems(self, path, root):
        if self.block < 1:
            yield f"{path}.block={self.block}: must be at least 1"


def attend(
    options: Blocked,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """See `ATTENTIONS`. It has a first derivative only, in reverse mode."""
    return _attend(options.block, q, k, v, segments, scoring)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block, q, k, v, segments, scoring):
    return _forward(block, q, k, v, segments, scoring)[0]


def _attend_forward(block, q, k, v, segments, scoring):
    out, log_sums = _forward(block, q, k, v, segments, scoring)
    return out, (q, k, v, segments, scoring, out, log_sums)


def _attend_backward(block, kept, d_out):
    d_q, d_k, d_v, d_sinks = _backward(block, *kept, d_out)
    return d_q, d_k, d_v, None, dataclasses.replace(kept[4], sinks=d_sinks)


_attend.defvjp(_attend_forward, _attend_backward)


@struct(static=("size", "repeats"))
class _Rows:
    """How queries or keys are cut into blocks.

    Attributes:
      segments: (n, B, t) document of each row.
      places: (n, t) place of each row in the text.
      size: positions in a block; t = repeats * size.
      repeats: query heads per kv head; 1 for keys.
    """

    segments: jax.Array
    places: jax.Array
    size: int
    repeats: int

    def cut(self, x: jax.Array) -> jax.Array:
        """(B, S, N, Dh) -> (n, B, Hkv, t, Dh); the last block is filled with zeros."""
        x = _filled(x, self.size)
        batch, length, heads, width = x.shape
        groups, blocks = heads // self.repeats, length // self.size
        x = x.reshape(batch, blocks, self.size, groups, self.repeats, width)
        x = x.transpose(1, 0, 3, 4, 2, 5)
        return x.reshape(blocks, batch, groups, self.repeats * self.size, width)

    def spread(self, sinks: jax.Array) -> jax.Array:
        """(H,), one number a head -> (Hkv, t), one a row of a block."""
        sinks = sinks.reshape(-1, self.repeats)
        return jnp.repeat(sinks, self.size, axis=1)

    def join(self, blocks: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse: (n, B, Hkv, t, Dh) to the shape and type of `like`."""
        count, batch, groups, _, width = blocks.shape
        x = blocks.reshape(count, batch, groups, self.repeats, self.size, width)
        x = x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, *like.shape[2:])
        return x[:, : like.shape[1]].astype(like.dtype)


def _filled(x: jax.Array, size: int, value: int = 0) -> jax.Array:
    wide = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, wide, constant_values=value)


def _rows(segments, first: Any, block: int, repeats: int, filler: int = 0) -> _Rows:
    """Rows from the documents (B, S), the first of which has the place `first`.

    `filler` is the document of rows that only fill the last block.
    """
    size = min(block, segments.shape[1])
    segments = _filled(segments, size, filler)
    batch, length = segments.shape
    places = first + jnp.arange(length, dtype=jnp.int32).reshape(-1, size)
    segments = segments.reshape(batch, -1, size).swapaxes(0, 1)
    return _Rows(
        segments=jnp.tile(segments, (1, 1, repeats)),
        places=jnp.tile(places, (1, repeats)),
        size=size,
        repeats=repeats,
    )


def _both_rows(block, q, k, segments: Segments) -> tuple[_Rows, _Rows]:
    repeats = q.shape[2] // k.shape[2]
    queries = _rows(segments.queries, segments.first, block, repeats)
    # A key that only fills its block is of no query's document.
    return queries, _rows(segments.keys, 0, block, 1, filler=-1)


def _bounds(
    queries: _Rows, keys: _Rows, scoring: Scoring = PLAIN
) -> tuple[jax.Array, jax.Array]:
    """First key block, and the one after the last, for each query block; both (n,)."""
    low = lambda rows: jnp.min(rows.segments, axis=-1)
    high = lambda rows: jnp.max(rows.segments, axis=-1)
    meet = low(keys)[None] <= high(queries)[:, None]
    meet &= high(keys)[None] >= low(queries)[:, None]
    seen = jnp.any(meet, axis=-1)
    if scoring.causal:
        seen &= keys.places[:, 0] <= queries.places[:, -1:]
    if scoring.window:
        seen &= queries.places[:, :1] - keys.places[:, -1] < scoring.window
    # There is a True in each row: no block is without a query, and it sees itself.
    last = seen.shape[1] - jnp.argmax(seen[:, ::-1], axis=1)
    return jnp.argmax(seen, axis=1), last


def _at(blocks: Any, index: jax.Array) -> Any:
    pick = lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False)
    return jax.tree.map(pick, blocks)


def _added(blocks: jax.Array, index: jax.Array, more: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(blocks, _at(blocks, index) + more, index, 0)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = score_dtype(b)
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


def _scores(
    q: jax.Array, query: Any, k: jax.Array, key: Any, scoring: Scoring
) -> tuple[jax.Array, jax.Array | None]:
    """(B, Hkv, t, u) of one block each, and the slope of the cap if there is one.

    Rows are (segments (B, t), places (t,)).
    """
    scores, slope = _product("bgtd,bgud->bgtu", q, k), None
    if scoring.softcap:
        bent = jnp.tanh(scores / scoring.softcap)
        scores, slope = scoring.softcap * bent, 1 - bent**2
    seen = query[0][:, :, None] == key[0][:, None, :]
    if scoring.causal:
        seen &= in_reach(query[1][:, None], key[1], scoring.window)
    return jnp.where(seen[:, None], scores, masked_out(scores.dtype)), slope


def _first(queries: _Rows, like: jax.Array, scoring: Scoring):
    """Maximum and sum of a block's softmax, (B, Hkv, t), before there is a key."""
    if scoring.sinks is None:
        return jnp.full_like(like, masked_out(like.dtype)), like
    top = queries.spread(scoring.sinks.astype(like.dtype))
    return jnp.broadcast_to(top, like.shape), jnp.ones_like(like)


def _forward(
    block, q, k, v, segments: Segments, scoring: Scoring
) -> tuple[jax.Array, jax.Array]:
    """(B, S, H, Dv), and the log-sum-exp of each query's scores (n, B, Hkv, t)."""
    queries, keys = _both_rows(block, q, k, segments)
    all_keys = keys.cut(k), keys.cut(v), (keys.segments, keys.places)

    def one(_, given):
        q, query, first, last = given

        def step(j, state):
            out, top, total = state
            k, v, key = _at(all_keys, j)
            scores, _ = _scores(q, query, k, key, scoring)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(weights, axis=-1)
            mixed = _product("bgtu,bgud->bgtd", weights.astype(v.dtype), v)
            return out * shrink[..., None] + mixed, new_top, total

        zeros = jnp.zeros((*q.shape[:-1], v.shape[-1]), score_dtype(q))
        state = zeros, *_first(queries, zeros[..., 0], scoring)
        out, top, total = lax.fori_loop(first, last, step, state)
        out = (out / total[..., None]).astype(q.dtype)
        return None, (out, top + jnp.log(total))

    rows = queries.segments, queries.places
    given = queries.cut(q), rows, *_bounds(queries, keys, scoring)
    _, (out, log_sums) = lax.scan(one, None, given)
    like = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype)
    out = checkpoint_name(queries.join(out, like), ATTENDED)
    return out, checkpoint_name(log_sums, ATTENDED)


def _backward(block, q, k, v, segments, scoring, out, log_sums, d_out):
    """Gradients of q, k, v and sinks; of keys and values added up over queries."""
    queries, keys = _both_rows(block, q, k, segments)
    all_keys = keys.cut(k), keys.cut(v), (keys.segments, keys.places)
    wide = score_dtype(q)
    # The derivative of the softmax takes its mean from each row.
    mean = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1, keepdims=True)

    def one(sums, given):
        q, d_out, log_sum, mean, query, first, last = given

        def step(j, state):
            d_q, d_k, d_v = state
            k, v, key = _at(all_keys, j)
            scores, slope = _scores(q, query, k, key, scoring)
            weights = jnp.exp(scores - log_sum[..., None])
            d_weights = _product("bgtd,bgud->bgtu", d_out, v)
            d_scores = weights * (d_weights - mean)
            d_scores = (d_scores if slope is None else d_scores * slope).astype(q.dtype)
            weights = weights.astype(v.dtype)
            d_q = d_q + _product("bgtu,bgud->bgtd", d_scores, k)
            d_k = _added(d_k, j, _product("bgtu,bgtd->bgud", d_scores, q))
            d_v = _added(d_v, j, _product("bgtu,bgtd->bgud", weights, d_out))
            return d_q, d_k, d_v

        state = jnp.zeros_like(q, wide), *sums
        d_q, *sums = lax.fori_loop(first, last, step, state)
        return tuple(sums), d_q.astype(q.dtype)

    rows = queries.segments, queries.places
    cut = map(queries.cut, (q, d_out))
    means, bounds = queries.cut(mean), _bounds(queries, keys, scoring)
    given = *cut, log_sums, means, rows, *bounds
    zeros = tuple(jnp.zeros_like(a, wide) for a in all_keys[:2])
    (d_k, d_v), d_q = lax.scan(one, zeros, given)
    d_sinks = _sinks_gradient(queries, scoring.sinks, log_sums, means[..., 0])
    return queries.join(d_q, q), keys.join(d_k, k), keys.join(d_v, v), d_sinks


def _sinks_gradient(queries: _Rows, sinks, log_sums, means):
    """(H,): a sink's weight takes the mean from each row; sums are (n, B, Hkv, t)."""
    if sinks is None:
        return None
    weights = jnp.exp(queries.spread(sinks.astype(log_sums.dtype)) - log_sums)
    rows = jnp.sum(weights * means, axis=(0, 1))
    return -rows.reshape(*sinks.shape, queries.size).sum(axis=-1).astype(sinks.dtype)
