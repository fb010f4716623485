"""What a run remembers of its routing, by hand and across a restart."""

import json

import numpy as np
import pytest

from moe_jax.moe.dispatch.plan import bucket_rows
from moe_jax.observe import loads
from moe_jax.observe.loads import RunLoads


def values(counts, peak=10, fill=0.5, skipped=False):
    return {
        "expert_counts": np.array(counts, np.int32),
        "peak_fill": np.int32(peak),
        "mean_fill": np.float32(10.0),
        "buffer_fill": np.float32(fill),
        "skipped": np.bool_(skipped),
    }


def test_violation_over_the_run_is_that_of_the_summed_counts():
    run = RunLoads()
    assert run.figures() == {} and list(run.lines()) == [] and run.saved() == {}
    run.add(values([[4, 0], [2, 2]]))
    run.add(values([[0, 4], [4, 0]]))
    run.add(values([[0, 99], [0, 99]], peak=99, skipped=True))
    found = run.figures()
    # Each batch violates by 1 in the first layer, the run does not; (6, 2) by 0.5.
    assert found["max_violation_run"] == pytest.approx((0 + 0.5) / 2)
    assert found["never_used"] == 0 and found["recent_steps"] == 2
    assert loads.violation(np.array([[4, 0], [2, 2]])) == pytest.approx(0.5)


def test_counts_of_a_long_run_do_not_wrap_around():
    run = RunLoads()
    for _ in range(3):
        run.add(values([[2**31 - 1, 0]]))
    assert run.saved() == {"expert_counts": [[3 * (2**31 - 1), 0]]}
    assert run.figures()["never_used"] == 1


def test_a_run_that_goes_on_has_the_figures_of_one_that_never_stopped():
    steps = np.random.default_rng(0).integers(0, 50, (7, 2, 4))
    whole, first = RunLoads(), RunLoads()
    for counts in steps:
        whole.add(values(counts))
    for counts in steps[:4]:
        first.add(values(counts))
    second = RunLoads(json.loads(json.dumps({"step": 4} | first.saved())))
    for counts in steps[4:]:
        second.add(values(counts))
    assert second.saved() == whole.saved()
    same = ("max_violation_run", "never_used")
    assert [second.figures()[n] for n in same] == [whole.figures()[n] for n in same]


@pytest.mark.parametrize("mean", [2.5, 10.0, 62.9, 700.0])
@pytest.mark.parametrize("over", [0.5, 1.0, 1.31, 4.0])
def test_the_needed_factor_is_the_smallest(mean, over):
    peak = int(np.ceil(mean * over))
    factor = loads.needed_factor(peak, mean)
    assert bucket_rows(mean, factor, 10**9) >= peak
    less = factor - 0.01
    assert less < 0.005 or bucket_rows(mean, less, 10**9) < peak


def test_advice_looks_at_the_last_steps():
    run = RunLoads()
    run.add(values([[1, 1]], peak=900, fill=9.0))
    for _ in range(loads.RECENT - 1):
        run.add(values([[1, 1]], peak=13, fill=0.8))
    found = run.figures()
    assert found["recent_steps"] == loads.RECENT and found["overflowed_steps"] == 1
    run.add(values([[1, 1]], peak=17, fill=1.1))
    found = run.figures()
    assert found["recent_steps"] == loads.RECENT and found["overflowed_steps"] == 1
    # 17 rows need 24, which is what more than 16 rows round up to.
    assert found["needed_capacity_factor"] == 1.61
    first, second = run.lines()
    assert first == (
        "MaxVio (fullest expert over the mean, less 1): 0.00 in the last step, 0.00 "
        "over the run; every expert was used"
    )
    assert second == (
        "buckets: too small in 1 of the last 100 steps; capacity_factor=1.61 is the "
        "smallest that serves each of them in one round"
    )


def test_without_buckets_or_experts():
    run = RunLoads()
    run.add({"skipped": np.bool_(False)})
    assert run.figures() == {}
    run.add({"skipped": np.bool_(False), "expert_counts": np.array([[3, 1]])})
    assert run.figures() == {"max_violation_run": 0.5, "never_used": 0}
    assert len(list(run.lines())) == 1
