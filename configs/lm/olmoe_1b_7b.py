"""OLMoE-1B-7B (Muennighoff et al. 2024, arXiv:2409.02060) on eight GPUs.

moe-jax train --config=configs/lm/olmoe_1b_7b.py --workdir=runs/olmoe (not run)

16 layers, width 2048, 16 heads of 128, queries and keys normed before they are split
into heads, 64 experts of width 1024 of which 8 serve a token, vocabulary 50304; rows of
4096 tokens, 4 a device and micro-batch. The published batch of 1024 rows is eight of
these.
Set `data` to text and a tokenizer of your own before training.
"""

from moe_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from moe_jax.data.sources import PythonSource
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """6.9 billion parameters, 1.3 billion of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=50304,
            num_layers=16,
            d_model=2048,
            num_heads=16,
            feed_forward=MoE(
                num_experts=64,
                experts=ExpertFeedForward(d_ff=1024),
                selector=TopK(top_k=8, renormalize=False),
                balance=Balance(load_balance_weight=0.01, z_weight=0.001),
                dispatch=Auto(),
            ),
            qk_norm="projection",
            norm_eps=1e-5,
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
        ),
        objective=NextToken(),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=4096),
        optimizer=AdamW(learning_rate=4e-4, weight_decay=0.1),
        schedule=Cosine(warmup_steps=2000, final=0.1),
        train=TrainConfig(steps=100_000, batch_size=128, accumulation=4),
        mesh=MeshConfig(fsdp=8),
    )
