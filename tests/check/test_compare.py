"""Differences of two runs by hand: ties, tolerances, what is counted."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.check import compare
from moe_jax.check import run as check_run
from moe_jax.train.state import TrainState


def test_near_ties_by_hand():
    choice_te = np.array(
        [
            [0.4, 0.3, 0.2, 0.1],
            [0.4, 0.3, 0.3, 0.0],  # second and third are equal
            [0.4, 0.4, 0.2, 0.0],  # a tie among the chosen: no matter
            [0.4, 0.3 + 1e-7, 0.3, 0.0],  # closer than float32 can tell
            [0.4, 0.3, 0.3, 0.0],  # padding
        ]
    )
    routing = types.SimpleNamespace(
        choice_te=choice_te[None],
        expert_tk=np.broadcast_to([0, 1], (1, 5, 2)),
        valid_tk=np.ones((1, 5, 2), bool),
        valid_t=np.array([[True, True, True, True, False]]),
    )
    assert compare._near_ties(routing, 1e-5) == [2]
    assert compare._near_ties(routing, 1e-8) == [1]
    # Where fewer serve, the boundary is another one: the third token's first two.
    routing.valid_tk = np.broadcast_to([True, False], (1, 5, 2))
    assert compare._near_ties(routing, 1e-5) == [1]
    routing.expert_tk = np.broadcast_to(np.arange(4), (1, 5, 4))
    routing.valid_tk = np.ones((1, 5, 4), bool)
    assert compare._near_ties(routing, 1e-5) == [0], "all experts are chosen"


def record(close, exact, **allowed):
    return compare.Record(
        close=close, exact=exact, allowed=allowed, dropped=0, near_ties=[]
    )


def test_differences_by_hand():
    reference = record(
        {"a": np.array([3.0, 4.0]), "zero": np.zeros(2), "gone": np.ones(1)},
        {"n": np.array([1, 2, 3])},
    )
    found = record(
        {"a": np.array([3.0, 4.5]), "zero": np.full(2, 3.0), "new": np.ones(1)},
        {"n": np.array([1, 0, 0])},
    )
    by_name = {d.name: d for d in compare.differences(found, reference, "float64")}
    assert by_name["a"].error == pytest.approx(0.1)
    assert by_name["zero"].error == pytest.approx(np.sqrt(18))
    assert by_name["gone"].error == by_name["new"].error == np.inf
    assert by_name["n"].error == 2 and by_name["n"].allowed == 0
    assert not any(d.passed for d in by_name.values())
    assert all(d.passed for d in compare.differences(found, found, "float32"))


def test_parameters_may_differ_as_far_as_the_optimizer_makes_them():
    a, b = np.array([3.0, 4.0]), np.array([3.0, 4.5])
    found, reference = record({"a": b}, {}), record({"a": a}, {}, a=0.2)
    (difference,) = compare.differences(found, reference, "float64")
    assert difference.passed and difference.allowed == 0.2
    (difference,) = compare.differences(reference, found, "float64")
    assert not difference.passed


def test_gradients_are_nudged_by_the_tolerance(float64):
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(40, 30)))}
    grads["w"] = grads["w"].at[0].set(0)
    nudged = check_run._nudged(grads, "float32")
    gap = np.asarray(nudged["w"] - grads["w"])
    assert compare.relative_error(
        np.asarray(nudged["w"]), np.asarray(grads["w"])
    ) == pytest.approx(1e-5)
    assert 0.3 < (gap > 0).mean() < 0.7 and np.ptp(np.abs(gap)) < 1e-15


def test_a_gradient_of_rounding_is_measured_against_the_whole():
    """A bias on all keys changes no attention: what is there has no digits."""

    def worst(size, dtype):
        one, two = (
            record({"grad_norm": np.float64(2.0), "grad/b_k": np.array([a, b])}, {})
            for a, b in ((size, 0.0), (0.0, size))
        )
        (found,) = (
            d for d in compare.differences(one, two, dtype) if d.name == "grad/b_k"
        )
        return found

    assert worst(1e-9, "float32").passed and worst(1e-7, "float32").passed
    assert worst(1e-7, "float32").error == pytest.approx(0.5e-7)
    assert not worst(4e-7, "float32").passed, "more than rounding"
    assert not worst(1e-7, "float64").passed and worst(1e-11, "float64").passed


def test_a_gradient_of_rounding_could_be_any_other_such():
    grads = {"w": jnp.full((4,), 1.0), "b": jnp.full((16,), 1e-9)}
    nudged = check_run._nudged(grads, "float32")
    apart = jnp.abs(nudged["b"] - grads["b"])
    # The norm of a nudge is a hundredth of the tolerance, of the whole gradient's 2.
    np.testing.assert_allclose(jnp.linalg.norm(apart), 0.01 * 1e-5 * 2, rtol=1e-3)
    np.testing.assert_allclose(jnp.abs(nudged["w"] - 1), 1e-5, rtol=0.02)


def test_what_begins_at_zero_is_filled():
    params = {"w": np.ones((2, 2), "f4"), "gate": np.zeros((3, 4), "f4")}
    state = TrainState(
        step=0, params=params, frozen={}, opt_state=None, router_state={}, ema=params
    )
    found = check_run.without_zeros(state)
    assert np.all(found.params["gate"])
    np.testing.assert_array_equal(found.params["w"], params["w"])
    np.testing.assert_array_equal(found.ema["gate"], found.params["gate"])
    assert not params["gate"].any(), "the fresh state is compared too"


def test_nan_does_not_pass():
    bad = record({"a": np.array([np.nan])}, {})
    (difference,) = compare.differences(bad, record({"a": np.ones(1)}, {}), "float32")
    assert not difference.passed
    (same,) = compare.differences(bad, bad, "float32")
    assert not same.passed


def test_worst_is_the_largest_excess():
    make = lambda name, error, allowed: compare.Difference(
        name=name, error=error, allowed=allowed
    )

    def worst(*differences):
        return check_run.Result(
            mesh="",
            dtype="float32",
            differences=list(differences),
            dropped=(0, 0),
            near_ties=[],
        ).worst.name

    assert worst(make("a", 0, 0), make("b", 2e-5, 1e-5), make("c", 1e-5, 1e-5)) == "b"
    assert worst(make("a", 5.0, 1e-5), make("count", 1, 0)) == "count"
    assert worst(make("a", 5.0, 1e-5), make("b", float("nan"), 1e-5)) == "b"
    assert worst(make("count", 0, 0), make("b", 1e-7, 1e-5)) == "b"


def test_initial_parameters_that_depend_on_the_mesh_are_counted():
    a = {"w": np.array([1.0, 2.0, 3.0]), "v": np.zeros(2)}
    b = {"w": np.array([1.0, 2.5, 3.0]), "v": np.array([0.0, 1e-30])}
    difference = check_run._initial(a, b)
    assert (difference.error, difference.allowed) == (2.0, 0.0)
    assert check_run._initial(a, a).passed
