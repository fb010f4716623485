"""A small Mixture-of-Experts decoder for measuring the step: 16 chips, EP 4.

moe-jax plan --config=configs/bench/small.py --topology=v5e:4x4

4 layers, width 1024, 8 heads of 128, 16 experts of width 512 of which 2 serve a
token, vocabulary 32000; rows of 1024 tokens, 4 a device; bfloat16 computation on
float32 weights. The text is a stand-in: the step's cost does not depend on it.
"""

from moe_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from moe_jax.data.sources import PythonSource
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """183 million parameters, 95 million of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=32000,
            num_layers=4,
            d_model=1024,
            num_heads=8,
            head_dim=128,
            feed_forward=MoE(
                num_experts=16,
                experts=ExpertFeedForward(d_ff=512),
                selector=TopK(top_k=2),
                dispatch=Auto(),
            ),
            tie_embeddings=False,
            dtype="bfloat16",
            remat="attention+exchanges+projections",
        ),
        objective=NextToken(),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=1024),
        optimizer=AdamW(learning_rate=3e-4, weight_decay=0.1),
        schedule=Cosine(warmup_steps=100),
        train=TrainConfig(steps=1000, batch_size=64),
        mesh=MeshConfig(fsdp=4, expert=4),
    )
