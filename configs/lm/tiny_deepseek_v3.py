"""DeepSeek-V3 in small, for tests and first tries on one CPU.

moe-jax train --config=configs/lm/tiny_deepseek_v3.py --workdir=runs/tiny_deepseek_v3

Latent attention with compressed queries, experts in groups with a bias, a shared
expert, two tokens predicted.
Bytes of Python's own library.
"""

from moe_jax.config import Config, DataConfig, TrainConfig
from moe_jax.data.sources import PythonSource
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.balance import Balance
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.nn.attention.latent import LatentAttention
from moe_jax.nn.rope import Rope, YaRN
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """382 thousand parameters, 189 thousand of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=258,
            num_layers=4,
            d_model=64,
            num_heads=4,
            latent=LatentAttention(
                query_rank=48, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16
            ),
            feed_forward=MoE(
                num_experts=8,
                experts=ExpertFeedForward(d_ff=32),
                shared_d_ff=32,
                selector=GroupLimited(top_k=2, num_groups=4, top_groups=2, scale=2.5),
                balance=Balance(
                    load_balance_weight=0.0,
                    sequence_weight=1e-4,
                    z_weight=0.0,
                    bias_rate=1e-3,
                ),
                first_dense=1,
                dense_d_ff=128,
            ),
            rope=Rope(
                interleaved=True,
                scaling=YaRN(
                    factor=40.0, original_length=64, mscale=1.0, mscale_all_dim=1.0
                ),
            ),
            tie_embeddings=False,
            mtp=1,
            init_std=0.1,
            dtype="float32",
            remat="none",
        ),
        objective=NextToken(mtp_weight=0.3),
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
