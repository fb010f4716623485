"""DeepSeek-V3 (arXiv:2412.19437) on 256 chips of TPU v5p, EP 8.

moe-jax plan --config=configs/lm/deepseek_v3.py --topology=v5p:4x8x8 --quick

61 layers, the first three of them dense; width 7168, latent attention with 128 heads,
queries from 1536 numbers a token and keys and values from 512; 256 experts of width
2048 of which 8 serve a token, chosen in 4 of 8 groups with a loss-free bias; a shared
expert; a module that predicts one token further (11.6 billion parameters more);
vocabulary 129280; rows of 4096 tokens, one a device. For more chips raise `mesh.data`
and `train.batch_size` alike.
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
from moe_jax.moe.selectors.group_limited import GroupLimited
from moe_jax.nn.attention.latent import LatentAttention
from moe_jax.nn.rope import Rope, YaRN
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """671 billion parameters and those of the module, 37.6 billion active per token."""
    return Config(
        model=Decoder(
            vocab_size=129280,
            num_layers=61,
            d_model=7168,
            num_heads=128,
            latent=LatentAttention(
                query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128
            ),
            feed_forward=MoE(
                num_experts=256,
                experts=ExpertFeedForward(d_ff=2048),
                shared_d_ff=2048,
                selector=GroupLimited(top_k=8, num_groups=8, top_groups=4, scale=2.5),
                balance=Balance(
                    load_balance_weight=0.0,
                    sequence_weight=1e-4,
                    z_weight=0.0,
                    bias_rate=1e-3,
                ),
                dispatch=Auto(),
                first_dense=3,
                dense_d_ff=18432,
            ),
            rope=Rope(
                interleaved=True,
                scaling=YaRN(
                    factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0
                ),
            ),
            tie_embeddings=False,
            mtp=1,
            dtype="bfloat16",
            remat="full",
        ),
        objective=NextToken(mtp_weight=0.3),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=4096),
        optimizer=AdamW(learning_rate=2.2e-4, weight_decay=0.1),
        schedule=Cosine(warmup_steps=2000),
        train=TrainConfig(steps=100_000, batch_size=256),
        mesh=MeshConfig(fsdp=32, expert=8),
    )
