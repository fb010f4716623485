"""The oracle of the benchmark, what was served, and how distances are measured."""

import dataclasses

import numpy as np
import pytest

from moe_jax.bench import layer as layer_lib
from moe_jax.bench import oracle, patterns
from moe_jax.bench.layer import Layer

LAYER = Layer(tokens=24, d_model=6, d_ff=5, num_experts=4, top_k=2)
NAMES = ("gate", "up", "down")


def found(choices, inputs):
    return oracle.Oracle(LAYER, inputs)(*choices)


def test_the_oracle_is_every_experts_output_by_its_weight(monkeypatch):
    inputs = layer_lib.draw(LAYER, 2, 0)
    sizes = patterns.Sizes(tokens=24, top_k=2, num_experts=4)
    expert_tk, valid_tk = choices = patterns.make("holes", sizes)
    whole = found(choices, inputs)
    differentiated = ("x", "combine weights", "w_gate", "w_up", "w_down")
    assert whole.keys() == {"output", *(f"gradient of {n}" for n in differentiated)}
    weights = {n: np.asarray(w, np.float64) for n, w in inputs.weights.items()}
    x_td, weight_tk = inputs.x.reshape(24, 6), inputs.weight.reshape(24, 2)
    want = np.zeros((24, 6))
    for t, k in np.argwhere(valid_tk):
        gate, up, down = (weights[f"w_{n}"][expert_tk[t, k]] for n in NAMES)
        before = x_td[t].astype(np.float64) @ gate
        hidden = before / (1 + np.exp(-before)) * (x_td[t] @ up)
        want[t] += weight_tk[t, k] * (hidden @ down)
    np.testing.assert_allclose(whole["output"], want, 1e-9, 1e-12)
    monkeypatch.setattr(oracle, "_MOST_ELEMENTS", 9 * 4 * (6 + 3 * 5))
    parts = found(choices, inputs)  # 8 at once: 9 do not divide 24.
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, 1e-9, 1e-12, err_msg=name)
        assert parts[name].shape == value.shape


def test_what_was_served():
    valid = np.array([[True, True], [True, False], [True, True]])
    want = np.array([[3.0, -4.0], [0.5, 9.0], [0.0, 2.0]])
    found = np.array([[3.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    served = lambda dropped: oracle.served(valid, found, want, dropped)
    np.testing.assert_array_equal(served(0), valid)
    # Of the zeros the largest that should be none; one should indeed be zero.
    np.testing.assert_array_equal(
        served(2), [[True, False], [False, False], [True, True]]
    )
    assert served(4) is None, "only three of the valid ones are zero"
    assert served(-1) is None
    assert valid.sum() == 5, "the caller's array"


def test_one_wrong_row_counts_the_same_among_many():
    for rows in (10, 10000):
        want = {"y": np.ones((rows, 4)), "none": np.zeros((rows, 2))}
        found = {name: a.astype(np.float32) for name, a in want.items()}
        assert oracle.errors(found, want) == {"y": 0.0, "none": 0.0}
        found["y"][3], found["none"][5, 1] = 0, 1e-3
        errors = oracle.errors(found, want)
        assert errors == {"y": pytest.approx(1), "none": pytest.approx(1e-3)}


def test_rows_that_are_zero_do_not_hide_others():
    want = np.zeros((1000, 2))
    want[0] = 1
    assert oracle.errors({"y": want * 0}, {"y": want})["y"] == pytest.approx(1)


def test_nan_is_no_small_error():
    want = {"y": np.ones((3, 2))}
    found = {"y": np.array([[1, 1], [np.nan, 1], [1, 1]])}
    assert np.isnan(oracle.errors(found, want)["y"])


def test_inputs_are_numbers_of_the_type():
    inputs = layer_lib.draw(dataclasses.replace(LAYER, dtype="bfloat16"), 4, 0)
    assert inputs.x.shape == (4, 6, 6) and inputs.weight.shape == (4, 6, 2)
    assert inputs.x.dtype == inputs.grad.dtype == "bfloat16"
    for stored in inputs.weights.values():
        assert stored.dtype == np.float32
        np.testing.assert_array_equal(stored, stored.astype(inputs.x.dtype))
