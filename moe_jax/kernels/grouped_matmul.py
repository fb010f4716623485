"""Grouped matmul of rows sorted by group (Gale et al. 2022), with its derivative.

TPUs and NVIDIA GPUs have kernels of their own (`grouped_tpu`, `grouped_gpu`), CPUs
have loops (`grouped_cpu`). Elsewhere, and where a kernel does not take the type,
`jax.lax.ragged_dot` multiplies, which costs G times the work there.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.kernels import grouped_cpu, grouped_gpu, grouped_tpu
from moe_jax.parallel.mesh import platform

Array = jax.Array

# Modules with `gmm` and `tgmm`, by platform.
KERNELS = {"tpu": grouped_tpu, "gpu": grouped_gpu, "cpu": grouped_cpu}
# What those of accelerators multiply; XLA does the rest.
_TYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

_CONTRACT_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _kernel_matmul(x: Array, w: Array, sizes: Array, where: str, interpret: bool):
    return KERNELS[where].gmm(x, w, sizes, interpret=interpret)


def _forward(x, w, sizes, where, interpret):
    is_trained = () if w.perturbed else None
    x, w, sizes = x.value, w.value, sizes.value
    out = _kernel_matmul(x, w, sizes, where, interpret)
    return out, (x, w, sizes, is_trained)


def _reverse(where, interpret, saved, grad):
    x, w, sizes, is_trained = saved
    kernels, grad_w = KERNELS[where], None
    if is_trained is not None:
        # First, so that it can travel while the rows' is computed.
        grad_w = kernels.tgmm(x, grad, sizes, interpret=interpret)
        grad, grad_w = jax.lax.optimization_barrier((grad, grad_w))
    grad_x = kernels.gmm(grad, w, sizes, transposed=True, interpret=interpret)
    return grad_x, grad_w, None


_kernel_matmul.defvjp(_forward, _reverse, symbolic_zeros=True)


def _kernels_for(x: Array, where: str | None) -> str | None:
    """The platform whose kernels multiply x; None: XLA does."""
    where = where or platform()
    takes = where == "cpu" or x.dtype in _TYPES
    return where if where in KERNELS and takes else None


def matmul(
    x: Array,
    w: Array,
    sizes: Array,
    where: str | None = None,
    interpret: bool = False,
) -> Array:
    """`out_r = x_r w_g` for the rows of each group; differentiable in x and w.

    Args:
      x: (R, K), sorted by group.
      w: (G, K, N).
      sizes: (G,) int32.
      where: the platform whose way is taken; None: that of the mesh.
      interpret: run kernels without their platform.

    Returns:
      (R, N); rows beyond the groups hold anything.
    """
    where = _kernels_for(x, where)
    if where:
        return _kernel_matmul(x, w, sizes, where, interpret)
    return jax.lax.ragged_dot(x, w, sizes)


def transposed_matmul(
    x: Array,
    y: Array,
    sizes: Array,
    where: str | None = None,
    interpret: bool = False,
) -> Array:
    """`out_g = sum_r x_r y_r^T` over the rows of each group, not differentiable.

    Args:
      x: (R, K), sorted by group.
      y: (R, N).
      sizes: (G,) int32.
      where: as for `matmul`.
      interpret: as for `matmul`.

    Returns:
      (G, K, N) of the type of x; zero for an empty group.
    """
    where = _kernels_for(x, where)
    if where:
        return KERNELS[where].tgmm(x, y, sizes, interpret=interpret)
    return jax.lax.ragged_dot_general(x, y, sizes, _CONTRACT_ROWS)
