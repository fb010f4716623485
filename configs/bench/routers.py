"""The quickstart's model with one router or another, for a comparison at equal tokens.

python benchmarks/routers.py

All have 16 experts of width 128 and the same dense parts, text and order of examples.
Two experts serve a token, except where the router itself says how many.
"""

from configs import quickstart
from moe_jax.config import Config
from moe_jax.moe.balance import Balance
from moe_jax.moe.noises.gaussian import Gaussian
from moe_jax.moe.selectors.sparse_mixer_v2 import SparseMixerV2
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.moe.selectors.top_p import TopP

TOP_K, EXPERT_WIDTH = 2, 128
# Weights that sum to K, as in the quickstart.
SCALE = float(TOP_K)
AUX = dict(load_balance_weight=0.01, z_weight=0.001)
VARIANTS = {
    "top_k": dict(
        selector=TopK(top_k=TOP_K, scale=SCALE),
        balance=Balance(**AUX),
    ),
    "sigmoid": dict(
        selector=TopK(top_k=TOP_K, score="sigmoid", scale=SCALE),
        balance=Balance(**AUX),
    ),
    # Sigmoid scores, as the authors advise: compare it with "sigmoid".
    "loss_free": dict(
        selector=TopK(top_k=TOP_K, score="sigmoid", scale=SCALE),
        balance=Balance(load_balance_weight=0.0, z_weight=0.001, bias_rate=1e-3),
    ),
    "noisy_top_k": dict(
        selector=TopK(top_k=TOP_K, scale=SCALE),
        noise=Gaussian(sigma=1.0),
        balance=Balance(
            load_balance_weight=0.0,
            z_weight=0.001,
            importance_weight=0.005,
            load_weight=0.005,
        ),
    ),
    "top_p": dict(
        selector=TopP(p=0.4, k_max=8, expected_k=3.0, renormalize=True, scale=SCALE),
        balance=Balance(**AUX),
    ),
    "sparse_mixer": dict(
        selector=SparseMixerV2(top_k=TOP_K, eps=0.1),
        balance=Balance(**AUX),
    ),
}


def get_config(variant: str = "top_k") -> Config:
    """One of `VARIANTS`."""
    config = quickstart.get_config()
    ff = config.model.feed_forward
    ff.experts.d_ff = EXPERT_WIDTH
    for name, value in VARIANTS[variant].items():
        setattr(ff, name, value)
    # Five percent held out: more text, so less of a difference is chance.
    config.data.validation_fraction = 0.05
    config.eval.baselines, config.eval.samples = False, 0
    return config
