"""A small model with four experts, on text that is passed several times in a run.

`spread.py:plain` reads files, `spread.py:packed` instructions whose rows hold whole
examples, `spread.py:mixed` both in the shares 2 to 1.
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
from moe_jax.data.sources import Instructions, Mixture, TextFiles
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.balance import Balance
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Constant


def get_config(variant: str) -> Config:
    # The tests run it in the folder of these files.
    plain = TextFiles(path="text")
    packed = Instructions(path="chats.jsonl", user="{}=", assistant="{}")
    mixed = Mixture(sources=(plain, packed), weights=(2, 1))
    source = {"plain": plain, "packed": packed, "mixed": mixed}[variant]
    return Config(
        model=Decoder(
            vocab_size=264,
            num_layers=2,
            d_model=16,
            num_heads=2,
            num_kv_heads=1,
            feed_forward=MoE(
                num_experts=4,
                experts=ExpertFeedForward(d_ff=16),
                selector=TopK(top_k=2),
                scorer=Linear(init_std=0.2),
                balance=Balance(bias_rate=0.01),
            ),
            init_std=0.1,
            dtype="float32",
            remat="none",
        ),
        objective=NextToken(),
        data=DataConfig(
            source=source,
            tokenizer=Bytes(),
            sequence_length=32,
            folder="cache",
            workers=1,
            validation_fraction=0.1,
        ),
        optimizer=AdamW(learning_rate=1e-2),
        schedule=Constant(warmup_steps=2),
        train=TrainConfig(steps=16, batch_size=8, compilation_cache="", ledger=True),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(every=4, keep_last=9),
        mesh=MeshConfig(expert=4),
        log=LogConfig(every=1, tensorboard=False),
    )
