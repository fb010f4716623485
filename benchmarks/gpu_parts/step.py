"""A training step of the shape of OLMoE-1B-7B, on random tokens."""

import importlib.util
import pathlib
import time

import jax
import numpy as np

from gpu_parts import common, jax_common
from moe_jax.config import Config, MeshConfig
from moe_jax.observe.flops import mfu
from moe_jax.parallel import batches
from moe_jax.train import setup

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "lm" / "olmoe_1b_7b.py"


def configured(sizes: common.Sizes) -> Config:
    """The config, on one device and in these sizes."""
    spec = importlib.util.spec_from_file_location("olmoe", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.mesh = MeshConfig()
    config.train.batch_size, config.train.accumulation = sizes.rows, 1
    config.data.sequence_length = sizes.length
    model = config.model
    model.num_layers, model.vocab_size = sizes.num_layers, sizes.vocab_size
    model.d_model, model.feed_forward.experts.d_ff = sizes.d_model, sizes.d_ff
    model.num_heads = max(1, sizes.d_model // 128)
    return config


def batch_of(sizes: common.Sizes) -> dict[str, np.ndarray]:
    shape = (sizes.rows, sizes.length)
    tokens = np.random.default_rng(0).integers(0, sizes.vocab_size, shape, np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": np.broadcast_to(np.arange(sizes.length, dtype=np.int32), shape),
        "segments": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }


def measure(sizes: common.Sizes):
    """Time, tokens a second, MFU, peak memory as planned and as seen."""
    rate = jax_common.dense_rate(sizes.dense)
    parts = setup.make_parts(configured(sizes), jax.devices()[:1])
    begin = time.perf_counter()
    compiled = setup.compile_step(parts)
    row = jax_common.versions() | {"compile_secs": time.perf_counter() - begin}
    row |= jax_common.memory(compiled)
    batch = batches.put(batch_of(sizes), parts.mesh, sizes.rows, 0)
    held = {"state": setup.fresh_state(parts)}

    def call():
        held["state"], metrics = compiled(held["state"], batch)
        return metrics

    row |= common.timed(call, jax.block_until_ready, calls=1)
    tokens, secs = sizes.rows * sizes.length, row["ms"] / 1e3
    flops = tokens * parts.model.flops_per_token(sizes.length)
    seen = jax.devices()[0].memory_stats() or {}
    yield row | {
        "loss": float(call()["loss"]),
        "tokens_per_sec": tokens / secs,
        "mfu": mfu(flops, secs, row["device"], 1),
        **common.speed(flops, row["ms"], rate),
        "peak_gb": seen.get("peak_bytes_in_use", 0) / 1e9,
    }
