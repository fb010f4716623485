"""A config that trains in a second a process: one layer, two experts, ten steps."""

from moe_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    TrainConfig,
)
from moe_jax.data.sources import TextFiles
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Constant


def get_config(experts: str = "2") -> Config:
    return Config(
        model=Decoder(
            vocab_size=264,
            num_layers=1,
            d_model=16,
            num_heads=2,
            num_kv_heads=2,
            feed_forward=MoE(
                num_experts=int(experts),
                experts=ExpertFeedForward(d_ff=16),
                selector=TopK(top_k=2),
            ),
            init_std=0.1,
            dtype="float32",
            remat="none",
        ),
        objective=NextToken(),
        data=DataConfig(
            source=TextFiles(path="text.txt"), tokenizer=Bytes(), sequence_length=16
        ),
        optimizer=AdamW(learning_rate=1e-2),
        schedule=Constant(warmup_steps=2),
        train=TrainConfig(steps=10, batch_size=8, compilation_cache="", agree_every=4),
        eval=EvalConfig(every=4, max_batches=1),
        checkpoint=CheckpointConfig(every=2, retry_secs=0.5),
        mesh=MeshConfig(data=1, expert=int(experts)),
        log=LogConfig(every=2, tensorboard=False),
    )
