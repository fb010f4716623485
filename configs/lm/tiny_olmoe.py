"""OLMoE in small, for tests and first tries on one CPU.

moe-jax train --config=configs/lm/tiny_olmoe.py --workdir=runs/tiny_olmoe

Queries and keys normed whole, 4 of 8 experts, weights that do not add up to one.
Bytes of Python's own library.
"""

from moe_jax.config import Config, DataConfig, TrainConfig
from moe_jax.data.sources import PythonSource
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """298 thousand parameters, 200 thousand of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=258,
            num_layers=4,
            d_model=64,
            num_heads=4,
            feed_forward=MoE(
                num_experts=8,
                experts=ExpertFeedForward(d_ff=32),
                selector=TopK(top_k=4, renormalize=False),
            ),
            qk_norm="projection",
            norm_eps=1e-5,
            tie_embeddings=False,
            init_std=0.1,
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
        optimizer=AdamW(learning_rate=2e-3, weight_decay=0.1),
        schedule=Cosine(warmup_steps=20),
        train=TrainConfig(steps=200, batch_size=8),
    )
