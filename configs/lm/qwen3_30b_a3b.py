"""Qwen3-30B-A3B (arXiv:2505.09388) on 16 chips of TPU v5p, EP 8.

moe-jax plan --config=configs/lm/qwen3_30b_a3b.py --topology=v5p:2x2x4 --quick

48 layers, width 2048, 32 heads of 128 over 4 key and value heads with a norm of each
head, 128 experts of width 768 of which 8 serve a token, vocabulary 151936; rows of 4096
tokens, 2 a device. The published balance loss is that of the whole batch.
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
from moe_jax.nn.rope import Rope
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """30.5 billion parameters, 3.4 billion of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=151936,
            num_layers=48,
            d_model=2048,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            feed_forward=MoE(
                num_experts=128,
                experts=ExpertFeedForward(d_ff=768),
                selector=TopK(top_k=8),
                balance=Balance(load_balance_weight=0.001, z_weight=0.0),
                dispatch=Auto(),
            ),
            qk_norm="head",
            rope=Rope(theta=1e6),
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
        ),
        objective=NextToken(),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=4096),
        optimizer=AdamW(learning_rate=3e-4, weight_decay=0.1),
        schedule=Cosine(warmup_steps=2000),
        train=TrainConfig(steps=100_000, batch_size=32),
        mesh=MeshConfig(fsdp=2, expert=8),
    )
