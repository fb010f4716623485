"""Times of things in turn."""

from moe_jax.bench import timing


def test_medians_and_quartiles():
    times = timing.Times((0.4, 0.1, 0.2, 0.3, 0.5))
    assert times.median == 0.3 and times.quartiles == (0.2, 0.4)
    assert times.shown() == "300.00 (200.00-400.00)"
    assert timing.Times((0.5,)).quartiles == (0.5, 0.5)


def test_calls_take_turns():
    seen = []
    calls = {name: lambda n=name: seen.append(n) for name in "ab"}
    found = timing.in_turn(calls, repeats=2, warm_up=1)
    assert "".join(seen) == "ababab"
    assert [len(found[name].seconds) for name in "ab"] == [2, 2]
