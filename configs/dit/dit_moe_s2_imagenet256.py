"""DiT-MoE-S/2-8E2A (Fei et al. 2024, arXiv:2407.11633) on latents of 256 x 256 pixels.

  moe-jax train --config=configs/dit/dit_moe_s2_imagenet256.py --workdir=runs/s2 \
      --config.data.source.images=latents.npy --config.data.source.labels=labels.npy

12 layers, width 384, 6 heads, patches of 2 x 2; 8 experts of width 1536 of which 2
serve a patch, shared ones of 768 together. DDPM with a learned variance, as in DiT. The
published sampler, whose latents a decoder is still to turn into images:

  moe-jax sample --workdir=runs/s2 --sampler=ddpm --steps=250 --guidance=1.5 \
      --guided_channels=3 --npz=latents.npz --out=''
"""

from moe_jax.config import CheckpointConfig, Config, MeshConfig, TrainConfig
from moe_jax.data.images.config import ImageDataConfig
from moe_jax.data.images.sources.latents import Latents
from moe_jax.diffusion.evaluation import ImageEvalConfig
from moe_jax.diffusion.processes.variance_preserving import VariancePreserving
from moe_jax.models.dit_config import SIZES, DiT
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.denoising import Denoising
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Constant


def sized(size: str, num_experts: int = 8) -> Config:
    """The same in another size; see `models.dit_config.SIZES`."""
    width = SIZES[size]["d_model"]
    return Config(
        model=DiT(
            **SIZES[size],
            image_size=32,
            in_channels=4,
            patch_size=2,
            num_classes=1000,
            qk_norm="layer" if size in ("XL", "G") else "none",
            feed_forward=MoE(
                num_experts=num_experts,
                experts=ExpertFeedForward(d_ff=4 * width),
                shared_d_ff=2 * width,
                scorer=Linear(init_std=0.0),
                selector=TopK(top_k=2, renormalize=False),
                balance=Balance(load_balance_weight=0.01, z_weight=0.0),
                dispatch=Auto(),
            ),
            dtype="bfloat16",
            remat="full",
        ),
        objective=Denoising(process=VariancePreserving(variance="learned_range")),
        # Latents of the encoder of Stable Diffusion 1, made beforehand (docs/data.md).
        data=ImageDataConfig(
            source=Latents(images="latents.npy", labels="labels.npy", scale=0.18215),
            validation_fraction=0.005,
        ),
        optimizer=AdamW(learning_rate=1e-4, b2=0.999, weight_decay=0.0, clip_norm=0.0),
        schedule=Constant(),
        train=TrainConfig(steps=400_000, batch_size=256, ema_decay=0.9999),
        eval=ImageEvalConfig(every=10_000),
        checkpoint=CheckpointConfig(every=10_000),
        mesh=MeshConfig(),
    )


def get_config() -> Config:
    """199.2 million parameters, 71.8 million of them active for a patch."""
    return sized("S")
