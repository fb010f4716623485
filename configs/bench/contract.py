"""Three small decoders whose compiled step is held to recorded costs.

python benchmarks/contract.py

Each takes another way through the code: `sharded` gathers its weights and exchanges
tokens exactly, `tensor` splits heads and widths and has dense blocks and shared
experts, `accumulated` replicates over `data`, drops tokens and has micro-batches.
"""

from moe_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from moe_jax.data.sources import PythonSource
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.dispatch.bucket import Bucket
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine

VARIANTS = {
    "sharded": dict(
        mesh=MeshConfig(fsdp=2, expert=4), moe=dict(dispatch=Exact()), remat="full"
    ),
    "tensor": dict(
        mesh=MeshConfig(fsdp=2, expert=2, tensor=2),
        moe=dict(shared_d_ff=256, first_dense=1, dense_d_ff=512),
        remat="dots",
    ),
    "accumulated": dict(
        mesh=MeshConfig(data=2, expert=4),
        moe=dict(dispatch=Bucket()),
        remat="none",
        accumulation=2,
    ),
}


def get_config(variant: str = "sharded") -> Config:
    """One of `VARIANTS`, for eight devices."""
    chosen = VARIANTS[variant]
    return Config(
        model=Decoder(
            vocab_size=2048,
            num_layers=4,
            d_model=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=128,
            feed_forward=MoE(
                num_experts=16,
                experts=ExpertFeedForward(d_ff=256),
                selector=TopK(top_k=2),
                **chosen["moe"],
            ),
            remat=chosen["remat"],
        ),
        objective=NextToken(),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=512),
        optimizer=AdamW(learning_rate=3e-4, weight_decay=0.1),
        schedule=Cosine(warmup_steps=100),
        train=TrainConfig(
            steps=1000, batch_size=32, accumulation=chosen.get("accumulation", 1)
        ),
        mesh=chosen["mesh"],
    )
