"""What XLA is told beside the program, by kind of chip."""

from moe_jax.parallel import mesh

# Chips with SparseCores can send weights while the matrix unit works: gathers and
# reduce-scatters become asynchronous, which XLA leaves off (libtpu 0.0.52). They queue,
# and the scheduler takes them for longer than it would, or they would start too late.
_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_offload_queuing_in_lhs": "true",
    "xla_tpu_sparse_core_all_gather_latency_multiplier": "4",
    "xla_tpu_sparse_core_reduce_scatter_latency_multiplier": "4",
}
# By JAX's `device_kind`.
_BY_KIND = {
    "TPU v5": _SPARSE_CORES,
    "TPU v5p": _SPARSE_CORES,
    "TPU v6 lite": _SPARSE_CORES,
    "TPU v6e": _SPARSE_CORES,
}


def sends_aside() -> bool:
    """Whether the mesh's chips send weights while they compute; see `options`."""
    return mesh.device_kind() in _BY_KIND


def options(device_kind: str, own: str = "") -> dict[str, str]:
    """Options for `jax.jit`.

    Args:
      device_kind: as JAX names it.
      own: `TrainConfig.xla_options`; they go before the defaults.
    """
    given = dict(entry.split("=", 1) for entry in own.split())
    chosen = _BY_KIND.get(device_kind, {}) | given
    return {name: value for name, value in chosen.items() if value}
