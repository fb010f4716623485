"""What `moe-jax bench` measures: parts of the trainer by themselves."""
