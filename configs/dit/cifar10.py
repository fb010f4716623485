"""A DiT-MoE on CIFAR-10, as TFDS has prepared it.

  pip install -e '.[tf]' && tfds build cifar10 --file_format=array_record
  moe-jax train --config=configs/dit/cifar10.py --workdir=runs/cifar10

The build downloads 170 MB; training needs no TensorFlow. Where the dataset lies, if not
in the folder of TFDS, says `--config.data.source.data_dir`. 8.2 million parameters, 4.2
million of them active for a patch.
"""

from moe_jax.config import CheckpointConfig, Config, TrainConfig
from moe_jax.data.images.config import ImageDataConfig
from moe_jax.data.images.sources.tfds_images import TfdsImages
from moe_jax.diffusion.evaluation import ImageEvalConfig
from moe_jax.diffusion.guidance import ClassifierFree
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
from moe_jax.train.schedules import Cosine

D_MODEL = 192


def get_config():
    return Config(
        model=DiT(
            image_size=32,
            in_channels=3,
            patch_size=4,
            num_layers=6,
            d_model=D_MODEL,
            num_heads=6,
            num_classes=10,
            learned_variance=False,
            feed_forward=MoE(
                num_experts=8,
                experts=ExpertFeedForward(
                    d_ff=3 * D_MODEL // 2, activation="gelu", gated=False, bias=True
                ),
                shared_d_ff=D_MODEL,
                selector=TopK(top_k=2, renormalize=False),
                balance=Balance(load_balance_weight=0.01, z_weight=0.0),
                dispatch=Auto(),
            ),
            dtype="float32",
            remat="none",
        ),
        objective=Denoising(
            process=RectifiedFlow(time_input="1000t"), times=LogitNormal()
        ),
        data=ImageDataConfig(
            source=TfdsImages(name="cifar10", validation_split="test"),
            validation_fraction=0.0,
            flip=True,
        ),
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.0),
        schedule=Cosine(warmup_steps=200, final=0.0),
        train=TrainConfig(steps=10_000, batch_size=128, ema_decay=0.999),
        eval=ImageEvalConfig(
            every=1000, samples=100, judged=5000, guidance=ClassifierFree(scale=1.5)
        ),
        checkpoint=CheckpointConfig(every=1000),
    )
