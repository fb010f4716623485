"""Checkpoints of DiT and DiT-MoE as their authors publish them: weights alone."""
