"""Slow and obvious numpy, in double precision: one assignment after the other."""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def expert(weights, e, x, activation="silu", clamp=np.inf, up_offset=0.0):
    """Expert e on one row; clamp and offset are of gated ones."""
    act = ACTIVATIONS[activation]

    def linear(x, name):
        bias = weights[f"b_{name}"][e] if f"b_{name}" in weights else 0
        return x @ weights[f"w_{name}"][e] + bias

    hidden = linear(x, "up")
    if "w_gate" in weights:
        hidden = np.minimum(np.maximum(hidden, -clamp), clamp) + up_offset
        hidden = act(np.minimum(linear(x, "gate"), clamp)) * hidden
    else:
        hidden = act(hidden)
    return linear(hidden, "down")


def mixture(weights, x_td, expert_tk, weight_tk, keep_tk, grad_td):
    """`y_t = sum_k w_tk f_e(x_t)` over what is kept, and the gradients of `y . grad`.

    Gated silu experts only; the derivative is written out by hand.

    Returns:
      y (T, D), and the gradients of weights, x and weight_tk.
    """
    y_td, x_grad = np.zeros_like(x_td), np.zeros_like(x_td)
    weight_grad = np.zeros_like(weight_tk)
    grads = {name: np.zeros_like(w) for name, w in weights.items()}
    for t, k in np.argwhere(keep_tk):
        e, x, share = expert_tk[t, k], x_td[t], weight_tk[t, k]
        w_gate, w_up, w_down = (weights[n][e] for n in ("w_gate", "w_up", "w_down"))
        before, up = x @ w_gate, x @ w_up
        s = sigmoid(before)
        gate = before * s
        out = (gate * up) @ w_down
        y_td[t] += share * out
        weight_grad[t, k] = grad_td[t] @ out
        out_grad = share * grad_td[t]
        hidden_grad = w_down @ out_grad
        up_grad = hidden_grad * gate
        before_grad = hidden_grad * up * (s + before * s * (1 - s))
        grads["w_down"][e] += np.outer(gate * up, out_grad)
        grads["w_up"][e] += np.outer(x, up_grad)
        grads["w_gate"][e] += np.outer(x, before_grad)
        x_grad[t] += w_up @ up_grad + w_gate @ before_grad
    return y_td, (grads, x_grad, weight_grad)


def positions(expert_tk, valid_tk, num_experts, shards):
    """Place of each assignment in its shard's bucket, and counts (shards, E).

    Shard s holds the s-th run of T / shards tokens.
    """
    place_tk = np.full(expert_tk.shape, -1)
    counts = np.zeros((shards, num_experts), int)
    for t, k in np.argwhere(valid_tk):
        shard, e = t * shards // len(expert_tk), expert_tk[t, k]
        place_tk[t, k] = counts[shard, e]
        counts[shard, e] += 1
    return place_tk, counts


def capacity(tokens, top_k, num_experts, factor):
    """Rows of a bucket: a multiple of 8 at least `factor` times the mean, at most T."""
    wanted = math.ceil(factor * tokens * top_k / num_experts)
    rows = next(rows for rows in range(8, 8 * tokens + 9, 8) if rows >= wanted)
    return min(rows, tokens)
