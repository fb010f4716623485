"""Lists of rows on GPUs: what a program is made of there, and the kernels' numbers.

Programs are traced and lowered for GPUs that are not there. The kernels run in the
interpreter, which leaves NaN where they write nothing.
"""

import functools

import dispatching
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import grouped_matmul
from moe_jax.moe.dispatch import local, permute, plan
from moe_jax.moe.dispatch.auto import Auto
from moe_jax.moe.dispatch.gather import Gather
from moe_jax.moe.dispatch.ragged import Ragged
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE, MoELayer
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.nn.module import Template

TRITON = "__gpu$xla.gpu.triton"


def layer_on(absent_gpus, dispatch, **sizes):
    """The text of a whole MoE layer, forward and backward, lowered for GPUs."""
    options = MoE(
        num_experts=8,
        experts=ExpertFeedForward(d_ff=64),
        selector=TopK(top_k=2),
        dispatch=dispatch,
    )
    template = Template(lambda rngs: MoELayer(128, options, rngs=rngs))
    weights = jax.eval_shape(template.init, jax.random.key(0))

    def loss(weights, x):
        y, _, aux = template.bind(weights)(x)
        return jnp.sum(y.astype(jnp.float32)) + sum(aux.losses.values())

    x = jax.ShapeDtypeStruct((8, 64, 128), jnp.bfloat16)
    with absent_gpus(**sizes):
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(weights, x)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("dispatch", "sizes"),
    [(Auto(), {}), (Ragged(), dict(data=2, expert=4)), (Gather(), dict(expert=4))],
    ids=["alone", "ragged", "gather"],
)
def test_a_layer_is_made_of_kernels(absent_gpus, dispatch, sizes):
    """On one GPU a list holds all rows: one round, and no loop for others."""
    alone = not sizes
    text = layer_on(absent_gpus, dispatch, **sizes)
    # Three matrices, forward and twice backward: once, or in each kind of round.
    kernels = text.count(TRITON)
    assert kernels == 9 if alone else kernels > 9
    assert ("stablehlo.while" in text) == (not alone)
    assert "ragged_dot" not in text
    exchanges = isinstance(dispatch, Ragged)
    assert ("ragged_all_to_all" in text) == exchanges


@pytest.mark.parametrize("kind", ["gated", "plain-bias"])
def test_kernels_give_what_the_oracle_gives(monkeypatch, kind):
    """Under every pattern, in one round and in several."""
    call = functools.partial(grouped_matmul.matmul, where="gpu", interpret=True)
    monkeypatch.setattr(grouped_matmul, "matmul", call)
    monkeypatch.setattr(permute, "platform", lambda: "gpu")
    monkeypatch.setattr(local, "uses_lists", lambda: True)
    monkeypatch.setattr(plan, "_LIST_MULTIPLE", 8)
    floats, grad = dispatching.drawn(kind, 8, 16, 2)
    cast = lambda tree: jax.tree.map(lambda a: a.astype(np.float32), tree)
    floats, grad = cast((floats, grad))
    run = dispatching.differentiated(
        Ragged(capacity_factor=0.5), kind, "alone", expected_k=2.0
    )
    for pattern, integers in dispatching.routings(128, 2).items():
        y, grads, stats = run(floats, integers, grad)
        want_y, want_grads, _ = dispatching.oracle(kind, 2.0)(floats, integers, grad)
        jax.tree.map(
            lambda a, b, p=pattern: np.testing.assert_allclose(
                a, b, rtol=1e-5, atol=1e-5, err_msg=p
            ),
            (y, grads),
            (want_y, want_grads),
        )
        assert stats.rounds >= (3 if pattern == "balanced" else 1)


def test_one_shard_exchanges_nothing(axes_mesh):
    """A mesh has an expert axis also where it splits nothing."""
    floats, grad = dispatching.drawn("plain", 8, 16, 2)
    integers = dispatching.routings(128, 2)["uniform"]
    run = dispatching.differentiated(Ragged(), "plain", "alone", 2.0)
    want_y, want_grads, _ = run(floats, integers, grad)
    with jax.set_mesh(axes_mesh(data=2)):
        anew = dispatching.differentiated(Ragged(), "plain", "alone", 2.0)
        text = anew.lower(floats, integers, grad).as_text()
        y, grads, stats = anew(floats, integers, grad)
    # The emulation of the exchange gathers.
    assert "all_gather" not in text and stats.rounds == 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        (y, grads),
        (want_y, want_grads),
    )
