"""A tiny diffusion transformer on digits with each of the routers of images.

moe-jax check --config=configs/bench/image_routers.py:promoe --mesh=expert=4,data=2
"""

from moe_jax.config import Config, TrainConfig
from moe_jax.data.images.config import ImageDataConfig
from moe_jax.data.images.sources.digits import Digits
from moe_jax.diffusion.evaluation import ImageEvalConfig
from moe_jax.diffusion.processes.rectified_flow import RectifiedFlow
from moe_jax.models.dit_config import DiT, mlp
from moe_jax.models.masks.switch_dit import SwitchDiT
from moe_jax.models.masks.task_routing import TaskRouting
from moe_jax.moe.balance import Balance
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.noises.sampled_experts import SampledExperts
from moe_jax.moe.scorers.cosine import Cosine
from moe_jax.moe.scorers.mlp import MLP
from moe_jax.moe.scorers.timestep import Timestep, TimestepMLP
from moe_jax.moe.selectors.diff_moe import DiffMoE
from moe_jax.moe.selectors.expert_choice import ExpertChoice
from moe_jax.moe.selectors.global_top_k import GlobalTopK
from moe_jax.moe.selectors.pro_moe import ProMoE, ProMoEChoice
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.denoising import Denoising
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Constant

D_MODEL, EXPERTS = 64, 8
PROTOTYPES = dict(scorer=Cosine(proj_dim=0, temperature=1.0, learned=False))
ROUTERS = {
    "dit_moe": dict(selector=TopK(top_k=2, renormalize=False)),
    "timestep": dict(scorer=Timestep(), selector=TopK(top_k=2, renormalize=False)),
    "mode": dict(scorer=TimestepMLP(), noise=SampledExperts(), selector=TopK(top_k=2)),
    "promoe": dict(selector=ProMoE(top_k=1), **PROTOTYPES),
    "promoe_choice": dict(selector=ProMoEChoice(), **PROTOTYPES),
    "ec_dit": dict(selector=ExpertChoice(capacity_factor=2.0, rounding="down")),
    "diffmoe": dict(selector=DiffMoE()),
    "expert_race": dict(
        scorer=MLP(hidden=D_MODEL),
        selector=GlobalTopK(
            top_k=2,
            k_max=EXPERTS,
            score="identity",
            threshold_decay=0.95,
            similarity_weight=1e-4,
        ),
    ),
}
TIMES = dict(data_time=0.0, noise_time=1000.0)
MASKS = {
    "switch_dit": SwitchDiT(prior_steps=100, **TIMES),
    "dtr": TaskRouting(**TIMES),
}
NAMES = (*ROUTERS, *MASKS)


def get_config(name: str = "dit_moe") -> Config:
    if name not in NAMES:
        raise ValueError(f"{name!r}: must be one of {NAMES}")
    return Config(
        model=DiT(
            image_size=8,
            in_channels=1,
            patch_size=2,
            num_layers=2,
            d_model=D_MODEL,
            num_heads=4,
            num_classes=10,
            learned_variance=False,
            input_mask=MASKS.get(name),
            feed_forward=mlp(D_MODEL) if name in MASKS else experts(name),
            dtype="float32",
            remat="none",
        ),
        objective=Denoising(process=RectifiedFlow(time_input="1000t")),
        data=ImageDataConfig(source=Digits()),
        optimizer=AdamW(learning_rate=1e-3),
        schedule=Constant(warmup_steps=2),
        train=TrainConfig(steps=20, batch_size=16),
        eval=ImageEvalConfig(),
    )


def experts(name: str) -> MoE:
    """The layer; only token choice among all experts takes a balance loss."""
    balanced = name in ("dit_moe", "timestep", "mode")
    return MoE(
        num_experts=EXPERTS,
        experts=ExpertFeedForward(d_ff=D_MODEL),
        shared_d_ff=D_MODEL,
        balance=Balance(load_balance_weight=0.01 * balanced, z_weight=0.0),
        **ROUTERS[name],
    )
