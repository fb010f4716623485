"""Diffusion transformers on MNIST, from its IDX files, as they are or gzipped.

  moe-jax train --config=configs/dit/mnist.py:dit_moe --workdir=runs/mnist \
    --config.data.source.images=t10k-images-idx3-ubyte.gz \
    --config.data.source.labels=t10k-labels-idx1-ubyte.gz

The variants have the same active feed-forward parameters in each block: `dense`,
`dit_moe` (top-2 of 8 and a shared expert), `promoe`, `expert_choice`, and `dtr`, the
dense one with task routing.
"""

from moe_jax.config import Config, FeedForwardConfig, TrainConfig
from moe_jax.data.images.config import ImageDataConfig
from moe_jax.data.images.sources.idx import Idx
from moe_jax.diffusion.evaluation import ImageEvalConfig
from moe_jax.diffusion.guidance import ClassifierFree
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.diffusion.times import LogitNormal
from moe_jax.models.dit_config import DiT, mlp
from moe_jax.models.masks.task_routing import TaskRouting
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers import cosine
from moe_jax.moe.selectors.expert_choice import ExpertChoice
from moe_jax.moe.selectors.pro_moe import ProMoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.denoising import Denoising
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine

VARIANTS = ("dense", "dit_moe", "promoe", "expert_choice", "dtr")
D_MODEL = 128
# Hidden units that serve a patch: 4 D, as in DiT.
ACTIVE = 4 * D_MODEL


def get_config(variant: str = "dit_moe") -> Config:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: must be one of {VARIANTS}")
    mask = TaskRouting(data_time=0.0, noise_time=1000.0) if variant == "dtr" else None
    return Config(
        model=DiT(
            image_size=28,
            in_channels=1,
            patch_size=7,
            num_layers=4,
            d_model=D_MODEL,
            num_heads=4,
            num_classes=10,
            learned_variance=False,
            input_mask=mask,
            feed_forward=feed_forward(variant),
            dtype="float32",
            remat="none",
        ),
        objective=Denoising(
            process=RectifiedFlow(time_input="1000t"), times=LogitNormal()
        ),
        data=ImageDataConfig(source=Idx(), validation_fraction=0.1),
        optimizer=AdamW(learning_rate=2e-3, weight_decay=0.0),
        schedule=Cosine(warmup_steps=100, final=0.0),
        train=TrainConfig(steps=1000, batch_size=64, ema_decay=0.99),
        eval=ImageEvalConfig(
            samples=80, judged=1000, guidance=ClassifierFree(scale=2.0)
        ),
    )


def feed_forward(variant: str) -> FeedForwardConfig:
    """Of the blocks; `ACTIVE` hidden units in each."""
    if variant in ("dense", "dtr"):
        return mlp(ACTIVE)
    plain = dict(activation="gelu", gated=False, bias=True)
    if variant == "promoe":  # One routed expert of 12 and a shared one, each 2 D wide.
        return MoE(
            num_experts=13,
            experts=ExpertFeedForward(d_ff=ACTIVE // 2, **plain),
            shared_d_ff=ACTIVE // 2,
            scorer=cosine.Cosine(proj_dim=0, temperature=1.0, learned=False),
            selector=ProMoE(top_k=1),
            balance=Balance(load_balance_weight=0.0, z_weight=0.0),
            dispatch=Auto(),
        )
    alpha = 0.01 if variant == "dit_moe" else 0.0
    choose = TopK(top_k=2, renormalize=False)
    if variant == "expert_choice":
        choose = ExpertChoice(capacity_factor=2.0, rounding="down")
    return MoE(
        num_experts=8,
        experts=ExpertFeedForward(d_ff=3 * ACTIVE // 8, **plain),
        shared_d_ff=ACTIVE // 4,
        selector=choose,
        balance=Balance(load_balance_weight=alpha, z_weight=0.0),
        dispatch=Auto(),
    )
