"""GPT-OSS-20B (arXiv:2508.10925) on 16 chips of TPU v5p, EP 4.

moe-jax plan --config=configs/lm/gpt_oss_20b.py --topology=v5p:2x2x4 --quick

24 layers, width 2880, 64 heads of 64 over 8 key and value heads with sinks and biases,
every other layer seeing 128 tokens; 32 experts of width 2880 of which 4 serve a token,
with clamped units and biases; vocabulary 201088; rows of 4096 tokens, 2 a device.
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
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.rope import Rope, YaRN
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """20.9 billion parameters, 4.2 billion of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=201088,
            num_layers=24,
            d_model=2880,
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            window=128,
            full_attention_every=2,
            sinks=True,
            attention_bias=True,
            attention_output_bias=True,
            feed_forward=MoE(
                num_experts=32,
                experts=ExpertFeedForward(
                    d_ff=2880,
                    activation="quick_gelu",
                    bias=True,
                    clamp=7.0,
                    up_offset=1.0,
                ),
                scorer=Linear(bias=True),
                selector=TopK(top_k=4),
                balance=Balance(load_balance_weight=0.01, z_weight=0.0),
                dispatch=Auto(),
            ),
            rope=Rope(
                theta=150000.0,
                scaling=YaRN(factor=32.0, original_length=4096, truncate=False),
            ),
            norm_eps=1e-5,
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
        ),
        objective=NextToken(),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=4096),
        optimizer=AdamW(learning_rate=2e-4, weight_decay=0.1),
        schedule=Cosine(warmup_steps=2000),
        train=TrainConfig(steps=100_000, batch_size=32),
        mesh=MeshConfig(fsdp=4, expert=4),
    )
