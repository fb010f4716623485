"""The whole MoE layer with its router, forward and backward, by how its rows lie."""

import jax
import jax.numpy as jnp

from gpu_parts import common, jax_common
from moe_jax.config import DispatchConfig, MeshConfig
from moe_jax.kernels import grouped_matmul
from moe_jax.moe.dispatch import local, permute
from moe_jax.moe.dispatch.exact import Exact
from moe_jax.moe.dispatch.ragged import Ragged
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE, MoELayer
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.module import Template
from moe_jax.parallel.mesh import make_mesh


def measure(sizes: common.Sizes):
    """Times of the ways to lay out rows, beside a dense product."""
    rate = jax_common.dense_rate(sizes.dense)
    yield jax_common.versions() | {"dense_tflops": rate / 1e12}
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        for name, dispatch in ways():
            run, make = program(dispatch, sizes)
            row, given = {"rows": name}, jax.jit(make)()
            try:
                compiled = jax.jit(run).lower(*given).compile()
                row |= jax_common.memory(compiled)
                row |= jax_common.timed(compiled, *given)
                row |= common.speed(sizes.layer_flops, row["ms"], rate)
            except jax.errors.JaxRuntimeError as failure:
                row |= {"failed": str(failure)[:200]}
            yield row


def ways():
    """Names and dispatches; the last have no kernels, so nothing comes after them."""
    has_kernels = local.uses_lists()
    yield "lists" if has_kernels else "buckets", Ragged()
    if has_kernels:
        here, permute.platform = permute.platform, lambda: ""
        yield "lists, tokens summed by a matmul", Ragged()
        permute.platform = here
    yield "buckets, by Exact", Exact()
    grouped_matmul.KERNELS.clear()
    local.uses_lists = lambda: True
    yield "lists, by ragged_dot", Ragged()


def program(dispatch: DispatchConfig, sizes: common.Sizes):
    """`run(weights, x, grad) -> y, gradients`, and what makes these in bfloat16."""
    options = MoE(
        num_experts=sizes.num_experts,
        experts=ExpertFeedForward(d_ff=sizes.d_ff),
        selector=TopK(top_k=sizes.top_k),
        dispatch=dispatch,
    )
    template = Template(lambda rngs: MoELayer(sizes.d_model, options, rngs=rngs))

    def make():
        weights = template.init(jax.random.key(0))
        cast = lambda a: a.astype(jnp.bfloat16)
        weights["experts"] = jax.tree.map(cast, weights["experts"])
        shape = (4, sizes.tokens // 4, sizes.d_model)
        return weights, jax_common.normal(0, *shape), jax_common.normal(1, *shape)

    def run(weights, x, grad):
        y, pull = jax.vjp(lambda w, x: template.bind(w)(x)[0], weights, x)
        return y, pull(grad)

    return run, make
