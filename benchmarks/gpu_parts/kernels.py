"""The kernels: how exact they are, and how fast by their tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpu_parts import common, jax_common
from moe_jax.kernels import grouped_gpu, grouped_matmul
from moe_jax.kernels.grouped_gpu import LARGE, SMALL

# Rows, K and N that no tile divides.
ROWS, K, N = 1003, 200, 136
CASES = {
    "drawn": common.drawn(900, 8),
    "one group": [0, 0, 900, 0, 0, 0, 0, 0],
    "all rows": common.drawn(ROWS, 8),
    "empty": [0] * 8,
}
TILES = (
    LARGE,
    LARGE._replace(stages=4),
    SMALL,
    SMALL._replace(depth=32, stages=4),
)


def measure(sizes: common.Sizes):
    """Errors, then rates."""
    yield jax_common.versions()
    for dtype in common.TOLERANCE:
        for name, counts in CASES.items():
            found = errors(dtype, counts)
            equal = all(e <= common.TOLERANCE[dtype] for e in found.values())
            yield {"type": dtype, "groups": name, "equal": equal, **found}
    yield from rates(sizes)


@functools.partial(jax.jit, static_argnums=4)
def _differentiated(x, w, counts, grad, interpret):
    multiply = lambda x, w: grouped_matmul.matmul(x, w, counts, "gpu", interpret)
    y, pull = jax.vjp(multiply, x, w)
    return y, *pull(grad)


def errors(dtype: str, counts) -> dict[str, float]:
    """Beside numpy in double precision, with NaN in rows of nobody."""
    draw = lambda seed, *shape: np.array(jax_common.normal(seed, *shape, dtype=dtype))
    x, w, grad = draw(0, ROWS, K), draw(1, len(counts), K, N), draw(2, ROWS, N)
    x[sum(counts) :] = grad[sum(counts) :] = np.nan
    given = x, w, jnp.array(counts, jnp.int32), grad
    y, grad_x, grad_w = jax.device_get(_differentiated(*given, not jax_common.on_gpu()))
    x, w, grad = (a.astype(np.float64) for a in (x, w, grad))
    want_y, want_x, want_w = np.zeros_like(grad), np.zeros_like(x), np.zeros_like(w)
    ends = np.cumsum(counts)
    for g, (end, count) in enumerate(zip(ends, counts, strict=True)):
        held = slice(end - count, end)
        want_y[held], want_x[held] = x[held] @ w[g], grad[held] @ w[g].T
        want_w[g] = x[held].T @ grad[held]
    served = slice(0, sum(counts))
    return {
        "value": common.error(y[served], want_y[served]),
        "of_x": common.error(grad_x[served], want_x[served]),
        "of_w": common.error(grad_w, want_w),
    }


def rates(sizes: common.Sizes):
    """Each kernel at the layer's size, its last group beside a product by numpy."""
    rate = jax_common.dense_rate(sizes.dense)
    yield {"dense_tflops": rate / 1e12}
    d, f, groups = sizes.d_model, sizes.d_ff, sizes.num_experts
    x = jax_common.normal(0, sizes.assignments, d)
    h = jax_common.normal(1, sizes.assignments, f)
    w = jax_common.normal(2, groups, d, f)
    counts = common.drawn(sizes.assignments, groups)
    last = slice(int(counts[:-1].sum()), None)
    wide = lambda a: np.asarray(a).astype(np.float32)
    x_last, h_last, w_last = wide(x[last]), wide(h[last]), wide(w[-1])
    gmm, tgmm = grouped_gpu.gmm, grouped_gpu.tgmm
    turned = functools.partial(gmm, transposed=True)
    for name, call, given, place, want in (
        ("gmm", gmm, (x, w), last, x_last @ w_last),
        ("gmm, transposed", turned, (h, w), last, h_last @ w_last.T),
        ("tgmm", tgmm, (x, h), -1, x_last.T @ h_last),
    ):
        for tiles in TILES:
            row = {"kernel": name, "tiles": str(tuple(tiles))}
            interpret = not jax_common.on_gpu()
            run = jax.jit(functools.partial(call, tiles=tiles, interpret=interpret))
            try:
                found = common.error(wide(run(*given, counts)[place]), want)
                row |= {"equal": found <= common.TOLERANCE["bfloat16"], "error": found}
                row |= jax_common.timed(run, *given, counts)
                row |= common.speed(sizes.product_flops, row["ms"], rate)
            except jax.errors.JaxRuntimeError as failure:
                row |= {"failed": str(failure)[:200]}
            yield row
