"""DiT-MoE-XL/2-8E2A (Fei et al. 2024, arXiv:2407.11633) on 16 chips of TPU v5e, EP 8.

  moe-jax plan --config=configs/dit/dit_moe_xl2_imagenet256.py --topology=v5e:4x4

28 layers, width 1152, 16 heads; queries and keys are normed. In each block 8 experts of
width 4608 of which 2 serve a patch, shared ones of 2304 together. Batches of 1024;
all else is that of DiT-MoE-S/2.
"""

from configs.dit import dit_moe_s2_imagenet256 as base
from moe_jax.config import Config, MeshConfig


def get_config() -> Config:
    """4.17 billion parameters, 1.49 billion of them active for a patch."""
    config = base.sized("XL", num_experts=8)
    config.mesh = MeshConfig(fsdp=2, expert=8)
    config.train.batch_size = 1024
    return config
