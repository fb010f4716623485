"""Mixtral 8x7B (Jiang et al. 2024, arXiv:2401.04088) on 16 chips of TPU v5p, EP 4.

moe-jax plan --config=configs/lm/mixtral_8x7b.py --topology=v5p:2x2x4

32 layers, width 4096, 32 heads of 128 over 8 key and value heads, 8 experts of width
14336 of which 2 serve a token, vocabulary 32000; rows of 4096 tokens, 2 a device.
Set `data` to text and a tokenizer of your own before training.
"""

from moe_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from moe_jax.data.sources import PythonSource
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.rope import Rope
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """46.7 billion parameters, 12.9 billion of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=32000,
            num_layers=32,
            d_model=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            feed_forward=MoE(
                num_experts=8,
                experts=ExpertFeedForward(d_ff=14336),
                selector=TopK(top_k=2),
                dispatch=Auto(),
            ),
            rope=Rope(theta=1e6),
            norm_eps=1e-5,
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
        ),
        objective=NextToken(),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=4096),
        optimizer=AdamW(learning_rate=1e-4, weight_decay=0.1),
        schedule=Cosine(warmup_steps=1000),
        train=TrainConfig(steps=100_000, batch_size=32),
        mesh=MeshConfig(fsdp=4, expert=4),
    )
