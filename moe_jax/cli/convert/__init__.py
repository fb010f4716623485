"""The commands of `moe-jax convert`."""
