"""The decoder in numpy, in double precision, one token at a time."""

import jax
import numpy as np
from decoding import B, D, H, S, V, W


def norm(x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def turn(x, position):
    half = W // 2
    z = x[:half] + 1j * x[half:]
    z = z * np.exp(1j * position * 100.0 ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


def gated(w, x):
    gate = x @ w["w_gate"]
    return (gate / (1 + np.exp(-gate)) * (x @ w["w_up"])) @ w["w_down"]


def attend(w, x, positions, segments):
    """One row: (S, D), with the position and the document of each token."""
    out = np.zeros((S, D))
    q, k, v = (np.einsum("sd,dhk->shk", x, w[n]) for n in ("w_q", "w_k", "w_v"))
    for s, h in np.ndindex(S, H):
        sees = [
            m
            for m in range(S)
            if segments[m] == segments[s] and positions[m] <= positions[s]
        ]
        query = turn(norm(q[s, h], w["q_norm"]["scale"]), positions[s])
        scores = [
            query
            @ turn(norm(k[m, h // 2], w["k_norm"]["scale"]), positions[m])
            / np.sqrt(W)
            for m in sees
        ]
        share = np.exp(scores) / np.exp(scores).sum()
        out[s] += share @ v[sees, h // 2] @ w["w_o"][h]
    return out


def mixture(w, x):
    """The two best experts of one token (D,), and the shared one."""
    scores = np.exp(x @ w["scorer"]["w"])
    chosen = np.argsort(-scores)[:2]
    y = gated(w["shared"], x)
    for e in chosen:
        one = {name: stacked[e] for name, stacked in w["experts"].items()}
        y = y + scores[e] / scores[chosen].sum() * gated(one, x)
    return y


def blocks_of(params):
    """The weights of the six blocks, in their order."""
    layer = lambda name, block, i: jax.tree.map(lambda w: w[i], params[name][block])
    blocks = [layer("segment_0", "block_0", 0)]
    for i in range(2):
        blocks += [layer("segment_1", "block_0", i), layer("segment_1", "block_1", i)]
    return [*blocks, layer("segment_2", "block_0", 0)]


def by_hand(params, given):
    """Logits (B, S, V) of the whole model."""
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    tokens, positions, segments = (
        np.asarray(a) for a in (given.tokens, given.positions, given.segments)
    )
    logits = np.zeros((B, S, V))
    for b in range(B):
        x = params["embedding"][tokens[b]]
        for w in blocks_of(params):
            normed = norm(x, w["attention_norm"]["scale"])
            x = x + attend(w["attention"], normed, positions[b], segments[b])
            normed = norm(x, w["feed_forward_norm"]["scale"])
            if "moe" in w:
                x = x + np.stack([mixture(w["moe"], row) for row in normed])
            else:
                x = x + gated(w["feed_forward"], normed)
        logits[b] = norm(x, params["norm"]["scale"]) @ params["embedding"].T
    return logits
