"""Checkpoints: save while training goes on, restore onto any mesh, verified."""

from moe_jax.checkpoint.retry import Saver
from moe_jax.checkpoint.store import Checkpoints, Restored

__all__ = ["Checkpoints", "Restored", "Saver"]
