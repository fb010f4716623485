"""A Mixture-of-Experts language model on the source code of Python's own library.

moe-jax train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from moe_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    TrainConfig,
)
from moe_jax.data.sources import PythonSource
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.balance import Balance
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine

STEPS = 500
NUM_EXPERTS, TOP_K, EXPERT_WIDTH = 16, 4, 64


def get_config() -> Config:
    """Sixteen experts over two CPU devices, 128-byte rows."""
    return Config(
        model=Decoder(
            vocab_size=264,
            num_layers=4,
            d_model=128,
            num_heads=4,
            num_kv_heads=2,
            feed_forward=MoE(
                num_experts=NUM_EXPERTS,
                experts=ExpertFeedForward(d_ff=EXPERT_WIDTH),
                # Weights that sum to K: at the start the layer's output is as large as
                # that of a dense one of the same active width.
                selector=TopK(top_k=TOP_K, scale=float(TOP_K)),
                scorer=Linear(init_std=0.1),
                balance=Balance(load_balance_weight=0.01, z_weight=0.001),
            ),
            qk_norm="head",
            init_std=0.06,
            dtype="float32",
            remat="none",
        ),
        objective=NextToken(),
        data=DataConfig(
            source=PythonSource(),
            tokenizer=Bytes(),
            sequence_length=128,
            validation_fraction=0.02,
        ),
        optimizer=AdamW(learning_rate=4e-3, weight_decay=0.1),
        schedule=Cosine(warmup_steps=50, final=0.05),
        train=TrainConfig(steps=STEPS, batch_size=16),
        eval=EvalConfig(baselines=True, samples=3, sample_tokens=200, prompt="def "),
        checkpoint=CheckpointConfig(every=200),
        mesh=MeshConfig(expert=2),
    )
