"""The diffusion transformer in numpy, in double precision: an oracle of tests."""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    """By its tanh approximation."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def affine(w, x):
    return x @ w["w"].reshape(len(w["w"]), -1) + w["b"].reshape(-1)


def two_layers(w, x):
    return affine(w["second"], silu(affine(w["first"], x)))


def waves(t):
    angles = t * 10000.0 ** (-np.arange(128) / 128)
    return np.concatenate([np.cos(angles), np.sin(angles)])


def places(side, width):
    """Column first, sines before cosines."""
    table, quarter = np.zeros((side * side, width)), width // 4
    for n in range(side * side):
        for half, place in enumerate((n % side, n // side)):
            angles = place * 10000.0 ** (-np.arange(quarter) / quarter)
            both = np.concatenate([np.sin(angles), np.cos(angles)])
            table[n, half * 2 * quarter : (half + 1) * 2 * quarter] = both
    return table


def attend(w, x, qk_norm):
    """All heads of one image, (N, D)."""
    heads, width = w["w_q"].shape[1:]
    out = np.zeros_like(x) + w["b_o"]
    for h in range(heads):
        q, k, v = (x @ w[f"w_{n}"][:, h] + w[f"b_{n}"][h] for n in "qkv")
        if qk_norm == "layer":
            q = norm(q) * w["q_norm"]["scale"] + w["q_norm"]["bias"]
            k = norm(k) * w["k_norm"]["scale"] + w["k_norm"]["bias"]
        out += softmax(q @ k.T / np.sqrt(width)) @ v @ w["w_o"][h]
    return out


def gated(w, x):
    return (silu(x @ w["w_gate"]) * (x @ w["w_up"])) @ w["w_down"]


def mlp(w, x):
    return gelu(x @ w["w_up"] + w["b_up"]) @ w["w_down"] + w["b_down"]


def mixture(w, x, top_k):
    """Top-k of a softmax over all, weights as they are; a shared expert."""
    y = gated(w["shared"], x)
    for n, row in enumerate(x):
        probs = softmax(row @ w["scorer"]["w"])
        for e in np.argsort(-probs)[:top_k]:
            one = {name: stacked[e] for name, stacked in w["experts"].items()}
            y[n] += probs[e] * gated(one, row)
    return y


def balance(w, x, top_k):
    """`E sum_e f_e P_e` of one layer over all rows."""
    probs = softmax(x @ w["scorer"]["w"])
    count = probs.shape[1]
    chosen = np.argsort(-probs, axis=1)[:, :top_k]
    shares = np.bincount(chosen.reshape(-1), minlength=count) / chosen.size
    return count * np.sum(shares * probs.mean(axis=0))


def forward(params, blocks, x, times, embedded, patch, qk_norm, top_k, mask=None):
    """The prediction, and each MoE layer's balance loss.

    Args:
      params: nested dict of float64 arrays.
      blocks: the weights of each block, in order.
      x: (B, H, H, C).
      times: (B,).
      embedded: (B, D) of classes.
      patch: side.
      qk_norm: "none" or "layer".
      top_k: K.
      mask: a block's weights, (B, N, D) and times to what blocks are masked by.
    """
    count, side = len(x), x.shape[1] // patch
    cut = lambda a, i, j: a[i * patch :, j * patch :][:patch, :patch]
    tokens = [
        np.stack([cut(one, *divmod(n, side)).reshape(-1) for n in range(side**2)])
        for one in x
    ]
    c = np.stack([two_layers(params["time"], waves(t)) for t in times]) + embedded
    h = affine(params["patches"], np.stack(tokens))
    h = h + places(side, h.shape[-1])
    losses = []
    for w in blocks:
        kept = h
        h = h if mask is None else h * mask(w, h, times)
        masked = h
        told = affine(w["modulation"]["linear"], silu(c))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(
            told[:, None], 6, axis=-1
        )
        seen = norm(h) * (1 + scale_a) + shift_a
        mixed = [attend(w["attention"], one, qk_norm) for one in seen]
        h = h + gate_a * np.stack(mixed)
        seen = norm(h) * (1 + scale_m) + shift_m
        if "moe" in w:
            y = np.stack([mixture(w["moe"], one, top_k) for one in seen])
            rows = seen.reshape(-1, seen.shape[-1])
            losses.append(balance(w["moe"], rows, top_k))
        else:
            y = mlp(w["feed_forward"], seen)
        h = kept + (h + gate_m * y - masked)
    told = affine(params["modulation"]["linear"], silu(c))
    shift, scale = np.split(told[:, None], 2, axis=-1)
    y = affine(params["output"], norm(h) * (1 + scale) + shift)
    out = np.zeros((count, *x.shape[1:3], y.shape[-1] // patch**2))
    for b in range(count):
        for n in range(side**2):
            i, j = divmod(n, side)
            square = y[b, n].reshape(patch, patch, -1)
            out[b, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = square
    return out, losses
