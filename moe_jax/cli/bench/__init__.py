"""Commands that measure a part by itself, one a file: `moe-jax bench NAME`."""
