"""Attention as its formula has it: what the attentions are compared with."""

import jax.numpy as jnp
import numpy as np


def by_formula(q, k, v, sinks, segments, window, softcap, causal=True):
    """Sums of exponentials, with keys and values repeated for the heads they serve."""
    length, repeats = q.shape[1], q.shape[2] // k.shape[2]
    segments, places = np.asarray(segments), np.arange(length)
    distance = places[:, None] - places
    seen = (distance >= 0) & (distance < (window or length))
    seen = seen if causal else np.ones_like(seen)
    seen = seen & (segments[:, :, None] == segments[:, None])
    k, v = (jnp.repeat(a, repeats, axis=2) for a in (k, v))
    scores = jnp.einsum("bshd,bmhd->bhsm", q, k)
    if softcap:
        scores = jnp.tanh(scores / softcap) * softcap
    weights = jnp.where(seen[:, None], jnp.exp(scores), 0)
    total = weights.sum(axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks)[:, None]
    return jnp.einsum("bhsm,bmhd->bshd", weights / total[..., None], v)
