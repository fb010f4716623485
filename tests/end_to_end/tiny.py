"""A config that trains in seconds: two layers, four experts, text of a file.

`tiny.py:drops` loses assignments, and its router finds all experts equally good.
`tiny.py:processes` has one expert on each of eight devices and takes four steps.
"""

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
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Constant, Cosine


def get_config(variant: str = "") -> Config:
    config = Config(
        model=Decoder(
            vocab_size=264,
            num_layers=2,
            d_model=32,
            num_heads=4,
            num_kv_heads=2,
            feed_forward=MoE(
                num_experts=4,
                experts=ExpertFeedForward(d_ff=32),
                selector=TopK(top_k=2),
                scorer=Linear(init_std=0.2),
                balance=Balance(bias_rate=0.01),
            ),
            qk_norm="head",
            init_std=0.1,
            dtype="float32",
            remat="none",
        ),
        objective=NextToken(),
        data=DataConfig(
            source=TextFiles(path="text.txt"), tokenizer=Bytes(), sequence_length=32
        ),
        optimizer=AdamW(learning_rate=1e-2),
        schedule=Cosine(warmup_steps=5),
        train=TrainConfig(steps=60, batch_size=8, compilation_cache=""),
        eval=EvalConfig(every=20, max_batches=2, samples=1, sample_tokens=8),
        checkpoint=CheckpointConfig(every=3),
        mesh=MeshConfig(expert=2),
        log=LogConfig(every=10),
    )
    if variant == "drops":
        config.model.feed_forward.dispatch = Bucket(capacity_factor=0.25)
        config.model.feed_forward.scorer.init_std = 1e-30
    elif variant == "processes":
        config.model.feed_forward.num_experts = config.mesh.expert = 8
        # Its program does not depend on the number of steps.
        config.schedule = Constant(warmup_steps=2)
        config.train.steps, config.checkpoint.every, config.eval.every = 4, 2, 0
        config.train.ledger = True
    elif variant:
        raise KeyError(variant)
    return config
