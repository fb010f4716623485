"""A small OLMoE (Muennighoff et al. 2024, arXiv:2409.02060), for a CPU.

python benchmarks/olmoe_vs_torch.py

4 layers of width 512, 8 heads of 64, 64 experts of width 256 of which 8 serve a
token, as in OLMoE, vocabulary 8192; 4 rows of 512 tokens; float32.
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
from moe_jax.train.schedules import Constant


def get_config() -> Config:
    """113 million parameters, 25 million of them active for a token."""
    return Config(
        model=Decoder(
            vocab_size=8192,
            num_layers=4,
            d_model=512,
            num_heads=8,
            feed_forward=MoE(
                num_experts=64,
                experts=ExpertFeedForward(d_ff=256),
                selector=TopK(top_k=8, renormalize=False),
                dispatch=Auto(),
                balance=Balance(load_balance_weight=0.01, z_weight=0.0),
            ),
            qk_norm="projection",
            norm_eps=1e-5,
            tie_embeddings=False,
            dtype="float32",
            remat="none",
        ),
        objective=NextToken(),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=512),
        optimizer=AdamW(learning_rate=4e-4, weight_decay=0.1),
        schedule=Constant(),
        train=TrainConfig(steps=1000, batch_size=4),
        mesh=MeshConfig(data=1),
    )
