"""DeepSeek-V2-Lite (arXiv:2405.04434) on 16 chips of TPU v6e, EP 4.

moe-jax plan --config=configs/lm/deepseek_v2_lite.py --topology=v6e:4x4

27 layers, the first of them dense; width 2048, latent attention with 16 heads, keys and
values from 512 numbers a token; 64 experts of width 1408 of which 6 serve a token, 2
shared experts (one of twice the width), vocabulary 102400; rows of 4096 tokens, 2 a
device.
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
from moe_jax.nn.attention.latent import LatentAttention
from moe_jax.nn.rope import Rope, YaRN
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """15.7 billion parameters, 2.7 billion of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=102400,
            num_layers=27,
            d_model=2048,
            num_heads=16,
            latent=LatentAttention(
                kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128
            ),
            feed_forward=MoE(
                num_experts=64,
                experts=ExpertFeedForward(d_ff=1408),
                shared_d_ff=2 * 1408,
                selector=TopK(top_k=6, renormalize=False),
                balance=Balance(
                    load_balance_weight=0.0, sequence_weight=0.001, z_weight=0.0
                ),
                dispatch=Auto(),
                first_dense=1,
                dense_d_ff=10944,
            ),
            rope=Rope(
                interleaved=True,
                scaling=YaRN(
                    factor=40.0,
                    original_length=4096,
                    mscale=0.707,
                    mscale_all_dim=0.707,
                ),
            ),
            tie_embeddings=False,
            dtype="bfloat16",
            remat="attention",
        ),
        objective=NextToken(),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=4096),
        optimizer=AdamW(learning_rate=4.2e-4, weight_decay=0.1),
        schedule=Cosine(warmup_steps=2000),
        train=TrainConfig(steps=100_000, batch_size=32),
        mesh=MeshConfig(fsdp=4, expert=4),
    )
