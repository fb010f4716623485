"""A small DiT-MoE on handwritten digits of 8 x 8 pixels, which come with the package.

  moe-jax train --config=configs/dit/digits.py --workdir=runs/digits

Rectified flow; 4 experts, 2 of them for each patch, and a shared one.
"""

from moe_jax.config import CheckpointConfig, Config, TrainConfig
from moe_jax.data.images.config import ImageDataConfig
from moe_jax.data.images.sources.digits import Digits
from moe_jax.diffusion.evaluation import ImageEvalConfig
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.diffusion.times import LogitNormal
from moe_jax.models.dit_config import DiT
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.denoising import Denoising
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Constant


def get_config():
    return Config(
        model=DiT(
            image_size=8,
            in_channels=1,
            patch_size=2,
            num_layers=4,
            d_model=128,
            num_heads=4,
            num_classes=10,
            learned_variance=False,
            feed_forward=MoE(
                num_experts=4,
                experts=ExpertFeedForward(d_ff=256),
                shared_d_ff=128,
                selector=TopK(top_k=2, renormalize=False),
                balance=Balance(load_balance_weight=0.01, z_weight=0.0),
                dispatch=Auto(),
            ),
            dtype="float32",
            remat="none",
        ),
        objective=Denoising(process=RectifiedFlow(), times=LogitNormal()),
        data=ImageDataConfig(source=Digits(), validation_fraction=0.2),
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.0),
        schedule=Constant(warmup_steps=100),
        train=TrainConfig(steps=1500, batch_size=128, ema_decay=0.995),
        eval=ImageEvalConfig(every=500, samples=100, judged=1000),
        checkpoint=CheckpointConfig(every=500),
    )
