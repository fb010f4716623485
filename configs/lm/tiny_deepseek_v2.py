"""DeepSeek-V2 in small, for tests and first tries on one CPU.

moe-jax train --config=configs/lm/tiny_deepseek_v2.py --workdir=runs/tiny_deepseek_v2

Latent attention, YaRN, a dense first layer, shared experts, 2 of 8 experts.
Bytes of Python's own library.
"""

from moe_jax.config import Config, DataConfig, TrainConfig
from moe_jax.data.sources import PythonSource
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.balance import Balance
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.attention.latent import LatentAttention
from moe_jax.nn.rope import Rope, YaRN
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """312 thousand parameters, 201 thousand of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=258,
            num_layers=4,
            d_model=64,
            num_heads=4,
            latent=LatentAttention(kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16),
            feed_forward=MoE(
                num_experts=8,
                experts=ExpertFeedForward(d_ff=32),
                shared_d_ff=64,
                selector=TopK(top_k=2, renormalize=False),
                balance=Balance(
                    load_balance_weight=0.0, sequence_weight=0.001, z_weight=0.0
                ),
                first_dense=1,
                dense_d_ff=128,
            ),
            rope=Rope(
                interleaved=True,
                scaling=YaRN(
                    factor=40.0, original_length=64, mscale=0.707, mscale_all_dim=0.707
                ),
            ),
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
