"""ProMoE-S/2 (Wei et al. 2025, arXiv:2510.24711) on latents of 256 x 256 pixels.

12 layers, width 384, 6 heads. In each second block 12 experts of width 768 of which
one serves a patch, one for images without a class, and a shared one. Rectified flow.
The published network has further channels, which its loss leaves out; here it has none.
"""

from configs.dit import dit_moe_s2_imagenet256 as base
from moe_jax.config import Config
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.diffusion.times import LogitNormal
from moe_jax.models.dit_config import SIZES
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.cosine import Cosine
from moe_jax.moe.selectors.pro_moe import ProMoE
from moe_jax.objectives.denoising import Denoising


def sized(size: str) -> Config:
    """The same in another size; see `models.dit_config.SIZES`."""
    config, width = base.sized(size), SIZES[size]["d_model"]
    model = config.model
    model.learned_variance, model.qk_norm = False, "none"
    model.feed_forward = MoE(
        num_experts=13,
        experts=ExpertFeedForward(
            d_ff=2 * width, activation="gelu", gated=False, bias=True
        ),
        shared_d_ff=2 * width,
        scorer=Cosine(proj_dim=0, temperature=1.0, learned=False),
        selector=ProMoE(top_k=1, score="identity", tau=0.07, contrastive_weight=1.0),
        balance=Balance(load_balance_weight=0.0, z_weight=0.0),
        dispatch=Auto(),
        every=2,
        dense_d_ff=4 * width,
    )
    config.objective = Denoising(
        process=RectifiedFlow(direction="noise_at_1", time_input="1000t"),
        times=LogitNormal(),
    )
    config.optimizer.clip_norm = 0.5
    config.train.steps = 500_000
    return config


def get_config() -> Config:
    """75.4 million parameters, 32.9 million of them active for a patch."""
    return sized("S")
