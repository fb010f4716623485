"""moe_jax: a scalable JAX trainer for Mixture-of-Experts models."""

import os

# XLA sizes the CPU client's thread pool from NPROC. With fewer threads than fake
# devices a collective waits for participants that never get a thread.
os.environ.setdefault("NPROC", str(max(32, os.cpu_count() or 1)))

# XLA:CPU's default scheduler lets independent collectives run in another order on each
# device. Fake devices that then wait for each other in different collectives hang.
_ORDERED = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
if "xla_cpu_enable_concurrency_optimized_scheduler" not in os.environ.get(
    "XLA_FLAGS", ""
):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_ORDERED}".strip()

__version__ = "0.1.0"
