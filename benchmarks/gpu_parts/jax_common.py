"""What the parts that use JAX share."""

import jax
import jax.numpy as jnp

from gpu_parts import common


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def versions() -> dict[str, str]:
    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def timed(function, *given) -> dict[str, float]:
    return common.timed(lambda: function(*given), jax.block_until_ready)


def memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """By the compiler, in GB of 10^9 bytes; the peak counts arguments."""
    found = compiled.memory_analysis()
    return {
        "temporary_gb": found.temp_size_in_bytes / 1e9,
        "planned_peak_gb": found.peak_memory_in_bytes / 1e9,
    }


def normal(seed: int, *shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def dense_rate(size: int) -> float:
    """FLOP/s of one bfloat16 product of random numbers."""
    a, b = normal(0, size, size), normal(1, size, size)
    return 2.0 * size**3 / (timed(jax.jit(jnp.matmul), a, b)["ms"] / 1e3)
