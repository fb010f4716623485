"""Which balance configs are refused, and why."""

import pytest

from moe_jax import config
from moe_jax.moe.balance import Balance
from moe_jax.moe.selectors.top_k import TopK

E = 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(load_balance_weight=-1.0), "load_balance_weight=-1.0: must not be neg"),
        (dict(entropy_weight=-2.0), "entropy_weight=-2.0: must not be negative"),
        (dict(bias_rate=-3.0), "bias_rate=-3.0: must not be negative"),
        (dict(load_share="all"), "load_share='all': must be one of"),
        (dict(bias_rate=0.1, bias_rule="x"), "bias_rule='x': must be one of"),
        (dict(bias_rate=0.1, bias_form="x"), "bias_form='x': must be one of"),
        (dict(bias_rule="proportional"), "would be ignored: bias_rate is 0"),
        (dict(bias_form="multiplicative"), "would be ignored: bias_rate is 0"),
        (dict(device_groups=2), "would be ignored: device_weight is 0"),
        (dict(load_balance_weight=0.0, load_share="first"), "no load-balance loss"),
        (dict(device_weight=0.1), "device_groups=0: must be at least 2 and divide"),
        (dict(device_weight=0.1, device_groups=4), "it takes one of [2, 3, 6]"),
        (dict(device_weight=0.1, device_groups=1), "device_groups=1: must be at"),
        (dict(device_weight=0.1, device_groups=3), ""),
        (dict(load_balance_weight=0.0, pooled_weight=1.0, load_share="tokens"), ""),
        (dict(bias_rate=0.1, bias_rule="proportional"), ""),
    ],
)
def test_problems(fields, words):
    options = Balance(**fields)
    found = list(options.problems("config.balance", config.Config()))
    found += list(options.layer_problems("config", E, TopK()))
    assert len(found) == bool(words), found
    assert not words or (words in found[0] and found[0].startswith("config.balance."))


def test_a_factor_needs_positive_scores():
    options = Balance(bias_rate=0.1, bias_form="multiplicative")
    before, after = TopK(softmax="before"), TopK(softmax="after")
    assert not list(options.layer_problems("config", E, before))
    (problem,) = options.layer_problems("config", E, after)
    assert problem.startswith("config.balance.bias_form='multiplicative' with")
    additive = Balance(bias_rate=0.1)
    assert not list(additive.layer_problems("config", E, after))
