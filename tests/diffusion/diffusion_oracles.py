"""Straightforward float64 references: loops over steps and plain formulas."""

import math

import numpy as np

from moe_jax.diffusion.processes import make_process
from moe_jax.diffusion.processes.variance_preserving import VariancePreserving


def schedule(**options):
    return make_process(VariancePreserving(**options))


def betas_of(name, steps):
    if name == "linear":
        low, high = 1e-4 * 1000 / steps, 0.02 * 1000 / steps
        return [low + (high - low) * i / (steps - 1) for i in range(steps)]
    shares = [(i / steps + 0.008) / 1.008 for i in range(steps + 1)]
    bars = [math.cos(share * math.pi / 2) ** 2 for share in shares]
    return [min(1 - bars[i + 1] / bars[i], 0.999) for i in range(steps)]


def bars_of(betas):
    found, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        found.append(product)
    return found


def posterior(betas, i, x0, x):
    """Mean and variance of q(x before | x, x0), by multiplying the two densities."""
    bar = bars_of(betas)[i]
    before = bars_of(betas)[i - 1] if i else 1.0
    # With y before x: p(x | y) = N(sqrt(1 - beta) y, beta), p(y | x0) = N(.., 1 - bar).
    if before == 1.0:
        return x0, 0.0
    precision = (1 - betas[i]) / betas[i] + 1 / (1 - before)
    mean = (
        math.sqrt(1 - betas[i]) / betas[i] * x + math.sqrt(before) / (1 - before) * x0
    ) / precision
    assert math.isclose(bar, before * (1 - betas[i]))
    return mean, 1 / precision


def log_variance_range(betas, i, v):
    """Between the posterior's and beta, with the posterior's of index 1 at 0."""
    small = math.log(posterior(betas, max(i, 1), 0.0, 0.0)[1])
    f = (v + 1) / 2
    return f * math.log(betas[i]) + (1 - f) * small


def images(shape=(2, 4, 4, 3), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
