"""DiT-MoE-B/2-8E2A (Fei et al. 2024, arXiv:2407.11633).

12 layers, width 768, 12 heads; 8 experts of width 3072 of which 2 serve a patch, shared
ones of 1536 together. All else is that of DiT-MoE-S/2.
"""

from configs.dit import dit_moe_s2_imagenet256 as base
from moe_jax.config import Config


def get_config() -> Config:
    """795.7 million parameters, 286.1 million of them active for a patch."""
    return base.sized("B", num_experts=8)
