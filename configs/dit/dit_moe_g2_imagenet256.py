"""DiT-MoE-G/2-16E2A (Fei et al. 2024, arXiv:2407.11633) on 16 chips of TPU v5p, EP 4.

  moe-jax plan --config=configs/dit/dit_moe_g2_imagenet256.py --topology=v5p:2x2x4

40 layers, width 1408, 16 heads; queries and keys are normed. In each block 16 experts
of width 5632 of which 2 serve a patch, shared ones of 2816 together. Batches of 1024;
all else is that of DiT-MoE-S/2.
"""

from configs.dit import dit_moe_s2_imagenet256 as base
from moe_jax.config import Config, MeshConfig


def get_config() -> Config:
    """16.50 billion parameters, 3.18 billion of them active for a patch."""
    config = base.sized("G", num_experts=16)
    config.mesh = MeshConfig(fsdp=4, expert=4)
    config.train.batch_size = 1024
    return config
