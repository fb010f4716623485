"""DiffMoE-L/2-E16 (Shi et al. 2025, arXiv:2503.14487) on latents of 256 x 256 pixels.

24 layers, width 1024, 16 heads. In each second block 16 experts, as wide as the dense
feed-forward, take their best patches of the whole batch. Rectified flow, data at 1.
"""

from configs.dit import dit_moe_s2_imagenet256 as base
from moe_jax.config import Config
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.models.dit_config import SIZES
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.diff_moe import DiffMoE
from moe_jax.objectives.denoising import Denoising


def get_config() -> Config:
    """1.98 billion parameters, 470.8 million of them active for a patch."""
    config, width = base.sized("L"), SIZES["L"]["d_model"]
    config.model.learned_variance = False
    config.model.feed_forward = MoE(
        num_experts=16,
        experts=ExpertFeedForward(
            d_ff=4 * width, activation="gelu", gated=False, bias=True
        ),
        selector=DiffMoE(capacity_factor=1.0, decay=0.95, predictor_weight=1.0),
        balance=Balance(load_balance_weight=0.0, z_weight=0.0),
        dispatch=Auto(),
        every=2,
        dense_d_ff=4 * width,
    )
    config.objective = Denoising(process=RectifiedFlow(direction="data_at_1"))
    config.train.steps = 700_000
    return config
