"""GPT-OSS in small, for tests and first tries on one CPU.

moe-jax train --config=configs/lm/tiny_gpt_oss.py --workdir=runs/tiny_gpt_oss

Windows in every other layer, sinks, biases, clamped units, 2 of 4 experts.
Bytes of Python's own library.
"""

from moe_jax.config import Config, DataConfig, TrainConfig
from moe_jax.data.sources import PythonSource
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.balance import Balance
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.linear import Linear
from moe_jax.nn.rope import Rope, YaRN
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """384 thousand parameters, 234 thousand of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=258,
            num_layers=4,
            d_model=64,
            num_heads=4,
            num_kv_heads=2,
            window=16,
            full_attention_every=2,
            sinks=True,
            attention_bias=True,
            attention_output_bias=True,
            feed_forward=MoE(
                num_experts=4,
                experts=ExpertFeedForward(
                    d_ff=96,
                    activation="quick_gelu",
                    bias=True,
                    clamp=7.0,
                    up_offset=1.0,
                ),
                scorer=Linear(bias=True),
                balance=Balance(load_balance_weight=0.01, z_weight=0.0),
            ),
            rope=Rope(
                theta=150000.0,
                scaling=YaRN(factor=32.0, original_length=64, truncate=False),
            ),
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
