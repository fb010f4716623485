"""The shape of DeepSeek-V3 (arXiv:2412.19437) on 256 chips of TPU v5p, EP 8.

moe-jax plan --config=configs/lm/deepseek_v3.py --topology=v5p:4x8x8 --quick

61 layers, the first three of them dense; width 7168, 256 experts of width 2048 of which
8 serve a token, chosen in 4 of 8 groups with a loss-free bias; a shared expert;
vocabulary 129280; rows of 4096 tokens, one a device. Not the published model yet: its
multi-head latent attention is replaced by plain attention with 128 heads of 128, and it
predicts one token. For more chips raise `mesh.data` and `train.batch_size` alike.
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
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """688 billion parameters, 54 billion of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=129280,
            num_layers=61,
            d_model=7168,
            num_heads=128,
            head_dim=128,
            feed_forward=MoE(
                num_experts=256,
                experts=ExpertFeedForward(d_ff=2048),
                shared_d_ff=2048,
                selector=GroupLimited(top_k=8, num_groups=8, top_groups=4, scale=2.5),
                balance=Balance(
                    load_balance_weight=0.0, sequence_weight=1e-4, bias_rate=1e-3
                ),
                dispatch=Auto(),
                first_dense=3,
                dense_d_ff=18432,
            ),
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
        ),
        objective=NextToken(),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=4096),
        optimizer=AdamW(learning_rate=2.2e-4, weight_decay=0.1),
        schedule=Cosine(warmup_steps=2000),
        train=TrainConfig(steps=100_000, batch_size=256),
        mesh=MeshConfig(fsdp=32, expert=8),
    )
