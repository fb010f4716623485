"""moe_jax: a scalable JAX trainer for Mixture-of-Experts models."""

import os

# XLA sizes the CPU client's thread pool from NPROC. With fewer threads than fake
# devices a collective waits for participants that never get a thread.
os.environ.setdefault("NPROC", str(max(32, os.cpu_count() or 1)))

__version__ = "0.1.0"
