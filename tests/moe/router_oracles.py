"""Routers in numpy, in double precision: one token, one expert after the other.

Each takes logits (T, E) and returns weights (T, E), zero for what is not served, and
(T, E) booleans of what is served. `batch` is (B, S) with B * S = T.
"""

import math

import numpy as np


def score(kind, z):
    """Scores of one token's logits."""
    if kind == "softmax":
        powers = np.exp(z - z.max())
        return powers / powers.sum()
    if kind == "identity":
        return z.copy()
    if kind == "sigmoid":
        return np.array([1 / (1 + math.exp(-v)) for v in z])
    return np.array([math.sqrt(math.log1p(math.exp(v))) for v in z])


def share(kind, z):
    scores = score(kind, z)
    return scores / scores.sum()


def order(values):
    """Indices from the largest on, ties by index."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))


def finish(weights, served, renormalize, scale):
    total = sum(weights[e] for e in served)
    out = np.zeros(len(weights))
    for e in served:
        out[e] = weights[e] / total * scale if renormalize else weights[e] * scale
    return out


def by_token(z, valid, pick):
    """`pick(logits of a token) -> weights (E,), served experts`."""
    gates, served = np.zeros(z.shape), np.zeros(z.shape, bool)
    for t in range(len(z)):
        if valid[t]:
            gates[t], experts = pick(z[t])
            served[t, list(experts)] = True
    return gates, served


def top_k(options, z, valid, batch, bias):
    def pick(row):
        scores = score(options.score, row)
        if options.softmax == "after":
            best = order(row + bias)[: options.top_k]
            powers = {e: math.exp(row[e]) for e in best}
            out = np.zeros(len(row))
            for e in best:
                out[e] = options.scale * powers[e] / sum(powers.values())
            return out, best
        best = order(scores + bias)[: options.top_k]
        return finish(scores, best, options.renormalize, options.scale), best

    return by_token(z, valid, pick)


def group_limited(options, z, valid, batch, bias):
    def pick(row):
        scores = score(options.score, row)
        size = len(row) // options.num_groups
        members = [range(g * size, (g + 1) * size) for g in range(options.num_groups)]
        compared = scores + bias
        if options.group_score == "max":
            of_group = [max(compared[e] for e in m) for m in members]
        else:
            of_group = [sum(sorted(compared[e] for e in m)[-2:]) for m in members]
        kept = order(of_group)[: options.top_groups]
        candidates = [e for g in kept for e in members[g]]
        best = sorted(candidates, key=lambda e: (-compared[e], e))[: options.top_k]
        return finish(scores, best, options.renormalize, options.scale), best

    return by_token(z, valid, pick)


def top_p(options, z, valid, batch, bias):
    def pick(row):
        shares = share(options.score, row)
        best, held = [], 0.0
        for e in order(shares + bias)[: options.k_max]:
            if held > options.p:
                break
            best.append(e)
            held += shares[e]
        return finish(shares, best, options.renormalize, options.scale), best

    return by_token(z, valid, pick)


def competitors(options, valid, batch):
    """Valid tokens by group."""
    rows, length = batch
    tokens = np.arange(rows * length).reshape(batch)
    groups = [tokens.ravel()] if options.group == "batch" else list(tokens)
    return [[t for t in group if valid[t]] for group in groups]


def expert_choice(options, z, valid, batch, bias):
    gates, served = np.zeros(z.shape), np.zeros(z.shape, bool)
    scores = np.array([score(options.score, row) for row in z])
    for tokens in competitors(options, valid, batch):
        for e in range(z.shape[1]):
            wanted = options.capacity_factor * len(tokens) / z.shape[1]
            wanted += 0.5 * (options.rounding == "nearest")
            count = min(len(tokens), max(1, math.floor(wanted)))
            for t in sorted(tokens, key=lambda t: (-scores[t, e], t))[:count]:
                gates[t, e] = options.scale * scores[t, e]
                served[t, e] = True
    return gates, served


def global_top_k(options, z, valid, batch, bias):
    gates, served = np.zeros(z.shape), np.zeros(z.shape, bool)
    scores = np.array([score(options.score, row) for row in z])
    if options.threshold_decay:  # Evaluation.
        for t in np.flatnonzero(valid):
            for e in order(scores[t] + bias)[: options.k_max]:
                if scores[t, e] + bias[e] >= thresholds(options):
                    gates[t, e] = options.scale * scores[t, e]
                    served[t, e] = True
        return gates, served
    for tokens in competitors(options, valid, batch):
        pairs = [
            (-(scores[t, e] + bias[e]), t, e)
            for t in tokens
            for e in order(scores[t] + bias)[: options.k_max]
        ]
        for _, t, e in sorted(pairs)[: options.top_k * len(tokens)]:
            gates[t, e] = options.scale * scores[t, e]
            served[t, e] = True
    return gates, served


def thresholds(options, num_experts=8):
    """What routers are tested with as their learned threshold."""
    if type(options).__name__ == "DiffMoE":
        return np.linspace(0.2, 0.6, num_experts)
    return 0.45


def without_condition(batch):
    """(T,) bool: every third image, from the second on, has no condition."""
    return np.repeat(np.arange(batch[0]) % 3 == 1, batch[1])


def predictions(tokens, num_experts=8):
    """(T, E): what a predictor of capacities is taken to say."""
    return np.sin(np.arange(tokens * num_experts) * 1.7).reshape(tokens, num_experts)


def diff_moe(options, z, valid, batch, bias):
    """Evaluation: how many by the predictor, which by the scores; image by image."""
    gates, served = np.zeros(z.shape), np.zeros(z.shape, bool)
    scores = np.array([score("softmax", row) for row in z])
    sure = 1 / (1 + np.exp(-predictions(*z.shape)))
    tokens = np.arange(len(z)).reshape(batch)
    for image in [tokens.ravel()] if options.eval_group == "batch" else tokens:
        inside = [t for t in image if valid[t]]
        for e in range(z.shape[1]):
            count = sum(sure[t, e] > thresholds(options)[e] for t in inside)
            for t in sorted(inside, key=lambda t: (-scores[t, e], t))[:count]:
                gates[t, e], served[t, e] = scores[t, e], True
    return gates, served


def _with_last(of_routed):
    """Adds the last expert, which alone serves images without condition."""

    def run(options, z, valid, batch, bias):
        none = without_condition(batch)
        parts = of_routed(options, z, valid & ~none, batch, bias)
        own = (none & valid)[:, None]
        return tuple(np.concatenate([p, own.astype(p.dtype)], axis=1) for p in parts)

    return run


@_with_last
def pro_moe(options, z, valid, batch, bias):
    def pick(row):
        scores = score(options.score, row)
        best = order(scores + bias)[: options.top_k]
        return finish(scores, best, False, 1.0), best

    return by_token(z, valid, pick)


@_with_last
def pro_moe_choice(options, z, valid, batch, bias):
    gates, served = np.zeros(z.shape), np.zeros(z.shape, bool)
    scores = np.array([score(options.score, row) for row in z])
    for image in np.arange(len(z)).reshape(batch):
        inside = [t for t in image if valid[t]]
        count = int(options.capacity_factor * len(inside) / z.shape[1])
        for e in range(z.shape[1]):
            best = sorted(inside, key=lambda t: (-scores[t, e], t))
            for t in best[: max(1, count)]:
                gates[t, e], served[t, e] = scores[t, e], True
    return gates, served


def masked(z, eps):
    """SparseMixer's mask: -inf where an expert is out."""
    top = z.max()
    return np.array(
        [-np.inf if (top - v) / max(abs(v), top) > 2 * eps else v for v in z]
    )


def sparse_mixer(options, z, valid, batch, bias):
    """Evaluation: the best expert with its masked probability."""

    def pick(row):
        probs = score("softmax", masked(row, options.eps))
        best = [order(row)[0]]
        return finish(probs, best, False, 1.0), best

    return by_token(z, valid, pick)


def sparse_mixer_v2(options, z, valid, batch, bias):
    """Evaluation: the best two, each with its probability among those left."""

    def pick(row):
        left, out, best = row.copy(), np.zeros(len(row)), []
        for _ in range(options.top_k):
            e = order(left)[0]
            out[e] = score("softmax", masked(left, options.eps))[e]
            best.append(e)
            left[e] = -np.inf
        return out, best

    return by_token(z, valid, pick)


def groups_of_mixing(options, batch):
    """Lists of tokens that are mixed."""
    rows, length = batch
    tokens = np.arange(rows * length).reshape(batch)
    if not hasattr(options, "group_size"):
        return list(tokens)
    size = options.group_size
    if options.across == "rows":
        return [
            tokens[first : first + size, s]
            for first in range(0, rows, size)
            for s in range(length)
        ]
    return [
        row[first : first + size] for row in tokens for first in range(0, length, size)
    ]


def soft_moe(options, z, valid, batch):
    """Merge and emit weights (T, E, P) of logits (T, E * P)."""
    merge, emit = np.zeros(z.shape), np.zeros(z.shape)
    for tokens in groups_of_mixing(options, batch):
        tokens = [t for t in tokens if valid[t]]
        for s in range(z.shape[1]):
            if tokens:
                merge[tokens, s] = score("softmax", z[tokens, s])
        for t in tokens:
            emit[t] = score("softmax", z[t])
    shape = (len(z), -1, options.slots_per_expert)
    return merge.reshape(shape), emit.reshape(shape)


def mixture_of_tokens(options, z, valid, batch):
    """Merge and emit weights (T, E, 1) of logits (T, E)."""
    merge, emit = np.zeros(z.shape), np.zeros(z.shape)
    for tokens in groups_of_mixing(options, batch):
        tokens = [t for t in tokens if valid[t]]
        for e in range(z.shape[1]):
            if tokens:
                merge[tokens, e] = score("softmax", z[tokens, e] / options.temperature)
        for t in tokens:
            emit[t] = score("softmax", z[t]) if options.emit == "softmax" else merge[t]
    return merge[..., None], emit[..., None]


def mixed(expert, merge, emit, x, groups):
    """`y_t = sum_ep emit f_e(sum_t' merge x_t')` with `expert(e, row)`."""
    y = np.zeros_like(x)
    for tokens in groups:
        for e in range(merge.shape[1]):
            for p in range(merge.shape[2]):
                slot = sum(merge[t, e, p] * x[t] for t in tokens)
                out = expert(e, slot)
                for t in tokens:
                    y[t] += emit[t, e, p] * out
    return y
