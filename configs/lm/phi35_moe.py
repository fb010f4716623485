"""Phi-3.5-MoE (arXiv:2404.14219) on 16 chips of TPU v5p, EP 4.

moe-jax plan --config=configs/lm/phi35_moe.py --topology=v5p:2x2x4 --quick

32 layers with LayerNorm, width 4096, 32 heads of 128 over 8 key and value heads with
biases, 16 experts of width 6400 of which 2 serve a token, chosen by SparseMixer;
vocabulary 32064; rows of 4096 tokens, 2 a device. The factors of its rotary positions
for long texts come with the checkpoint (`moe-jax convert from-hf`).
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
from moe_jax.moe.noises.input_jitter import InputJitter
from moe_jax.moe.selectors.sparse_mixer_v2 import SparseMixerV2
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine


def get_config() -> Config:
    """41.9 billion parameters, 6.6 billion of them active per token."""
    return Config(
        model=Decoder(
            vocab_size=32064,
            num_layers=32,
            d_model=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            attention_bias=True,
            attention_output_bias=True,
            feed_forward=MoE(
                num_experts=16,
                experts=ExpertFeedForward(d_ff=6400),
                selector=SparseMixerV2(top_k=2, eps=0.01),
                noise=InputJitter(eps=0.01),
                balance=Balance(load_balance_weight=0.0, z_weight=0.0),
                dispatch=Auto(),
            ),
            norm="layer",
            norm_eps=1e-5,
            tie_embeddings=False,
            output_bias=True,
            dtype="bfloat16",
            remat="full",
        ),
        objective=NextToken(),
        data=DataConfig(source=PythonSource(), tokenizer=Bytes(), sequence_length=4096),
        optimizer=AdamW(learning_rate=1e-4, weight_decay=0.1),
        schedule=Cosine(warmup_steps=2000),
        train=TrainConfig(steps=100_000, batch_size=32),
        mesh=MeshConfig(fsdp=4, expert=4),
    )
