"""Switch-DiT-S/2 (Park et al. 2024, arXiv:2403.09176) on latents of 256 x 256 pixels.

12 layers, width 384, 6 heads, dense; what enters a block is masked by 2 of 3 linear
experts that the time chooses. Cosine schedule; its guidance was of all channels.
"""

from configs.dit import dit_moe_s2_imagenet256 as base
from moe_jax.config import Config
from moe_jax.models.dit_config import SIZES, mlp
from moe_jax.models.masks.switch_dit import SwitchDiT


def sized(size: str) -> Config:
    """The same in another size; see `models.dit_config.SIZES`."""
    config = base.sized(size)
    config.model.feed_forward = mlp(4 * SIZES[size]["d_model"])
    config.model.input_mask = SwitchDiT(num_experts=3, top_k=2, prior_weight=1.0)
    config.model.qk_norm = "none"
    config.objective.process.schedule = "cosine"
    return config


def get_config() -> Config:
    """38.2 million parameters, 36.4 million of them active for a patch."""
    return sized("S")
