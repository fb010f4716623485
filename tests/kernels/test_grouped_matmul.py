"""The grouped matmul of every platform in the interpreter, by one matmul a group."""

import functools
import re

import grouped
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import grouped_matmul


@functools.partial(jax.jit, static_argnums=4)
def differentiated(x, w, counts, grad, where):
    call = lambda x, w: grouped_matmul.matmul(x, w, counts, where, interpret=True)
    y, pull = jax.vjp(call, x, w)
    return y, *pull(grad)


@pytest.mark.parametrize(("k", "n"), [(128, 256), (24, 40)])
@pytest.mark.parametrize(("sizes", "rows"), grouped.CASES, ids=str)
@pytest.mark.parametrize("where", grouped_matmul.KERNELS)
def test_values_and_gradients(where, sizes, rows, k, n):
    x, w, grad = inputs = grouped.drawn(sizes, rows, k, n)
    counts = jnp.array(sizes, jnp.int32)
    found = differentiated(x, w, counts, grad, where)
    grouped.check(sizes, inputs, *found)


@pytest.mark.parametrize("where", grouped_matmul.KERNELS)
def test_sums_are_taken_in_single_precision(where):
    x = jnp.ones((512, 128), jnp.bfloat16)
    y = jnp.full((512, 128), 1 + 2.0**-7, jnp.bfloat16)
    sizes = jnp.array([512], jnp.int32)
    sums = grouped_matmul.transposed_matmul(x, y, sizes, where, interpret=True)
    np.testing.assert_array_equal(sums.astype(np.float32), 516.0)


def test_elsewhere_xla_multiplies():
    """The same contract without kernels, for the tests of what is built on it."""
    x, w, grad = grouped.drawn([100, 0, 156, 64], 384, 24, 40)
    x[320:] = grad[320:] = 0
    sizes = jnp.array([100, 0, 156, 64], jnp.int32)
    y = grouped_matmul.matmul(x, w, sizes)
    sums = grouped_matmul.transposed_matmul(jnp.asarray(x), jnp.asarray(grad), sizes)
    for g, held in enumerate(grouped.groups([100, 0, 156, 64])):
        np.testing.assert_allclose(y[held], x[held] @ w[g], rtol=1e-5, atol=1e-4)
        want = x[held].T @ grad[held]
        np.testing.assert_allclose(sums[g], want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("where", ["tpu", "gpu"])  # The loops of CPUs have no names.
def test_the_gradient_of_weights_is_first_and_only_where_it_is_wanted(where):
    x, w, _ = grouped.drawn([100, 28], 128, 24, 40)
    sizes = jnp.array([100, 28], jnp.int32)
    run = lambda x, w: jnp.sum(
        grouped_matmul.matmul(x, w, sizes, where, interpret=True)
    )

    def kernels(argnums):
        text = str(jax.make_jaxpr(jax.grad(run, argnums))(x, w))
        return re.findall(r"\bname=(t?gmm)\b|(optimization_barrier)", text)

    named = lambda *names: [
        ("", name) if name == "optimization_barrier" else (name, "") for name in names
    ]
    assert kernels(0) == named("gmm", "gmm")
    assert kernels((0, 1)) == named("gmm", "tgmm", "optimization_barrier", "gmm")
