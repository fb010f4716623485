"""The train step: accumulation, the NaN guard, the average, and where things lie."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.check.rows import random_batch
from moe_jax.check.run import with_dtype
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.parallel import batches
from moe_jax.train import setup, step
from moe_jax.tree import named_leaves

EMA_DECAY = 0.75
EXPERTS = "segment_0/block_0/moe/experts"


def gradients(config, state, batch):
    parts = setup.make_parts(config, jax.devices()[:1])
    run = jax.jit(lambda s, b: step.compute_gradients(config, parts.model, s, b))
    with jax.set_mesh(parts.mesh):
        return jax.device_get(run(state, batch))


@pytest.mark.slow
def test_accumulation_does_not_change_the_gradient(tiny, float64):
    tiny = with_dtype(tiny, "float64")
    tiny.model.feed_forward.dispatch = DenseDispatch()
    tiny.model.feed_forward.balance = Balance(load_balance_weight=0.0, z_weight=0.0)
    tiny.objective.logit_z_weight = 0.01
    state = setup.fresh_state(setup.make_parts(tiny, jax.devices()[:1]))
    batch = random_batch(tiny, "float64")
    for row, weights in enumerate(batch["weights"]):
        weights[: 3 * row] = 0
    scored = [batch["weights"][i::4].sum() for i in range(4)]
    assert min(scored) < 0.8 * max(scored), "a mean of means would differ"

    whole = gradients(tiny, state, batch)
    tiny.train.accumulation = 4
    cut = gradients(tiny, state, batch)
    assert whole.loss.dtype == np.float64
    assert whole.weight == cut.weight == sum(scored)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=1e-12)
    np.testing.assert_allclose(cut.reported, whole.reported, rtol=1e-12)
    assert whole.loss > whole.reported, "the z-loss counts"
    for name, grad in named_leaves(whole.grads).items():
        gap = np.linalg.norm(named_leaves(cut.grads)[name] - grad)
        assert gap < 1e-11 * np.linalg.norm(grad), name
    counts_le = whole.aux.health["counts"]
    assert counts_le.sum() == 2 * 2 * (batch["segments"] > 0).sum()
    np.testing.assert_array_equal(cut.aux.health["counts"], counts_le)
    assert (
        named_leaves(cut.observations).keys() == named_leaves(whole.observations).keys()
    )
    for name, value in named_leaves(whole.observations).items():
        np.testing.assert_array_equal(named_leaves(cut.observations)[name], value)


@dataclasses.dataclass
class Run:
    """A compiled step on 2 data, 2 fsdp and 2 expert shards."""

    parts: setup.Parts
    compiled: object

    def place(self, state):
        return jax.device_put(state, self.parts.shardings)

    def step(self, state, **changed):
        config = self.parts.config
        batch = random_batch(config, "float32") | changed
        placed = batches.put(batch, self.parts.mesh, config.train.batch_size, 0)
        return self.compiled(state, placed)


@pytest.fixture(scope="module")
def run(make_sharded):
    parts = setup.make_parts(make_sharded())
    assert parts.config.train.ema_decay == EMA_DECAY
    return Run(parts, setup.compile_step(parts))


@pytest.fixture(scope="module")
def begun(run):
    """A state after one step, on the host."""
    state, metrics = run.step(setup.fresh_state(run.parts))
    assert not metrics["skipped"]
    return jax.device_get(state)


def test_options_of_xla_reach_the_compiler(tiny):
    tiny.train.xla_options = "xla_no_such_option=1"
    lowered = setup.lower_step(setup.make_parts(tiny, jax.devices()[:1]))
    with pytest.raises(Exception, match="xla_no_such_option"):
        lowered.compile()


@pytest.mark.slow
def test_moments_lie_where_their_parameters_lie(run):
    """Without explicit shardings jit replicates what `optimizer.init` makes."""
    fresh = setup.fresh_state(run.parts)
    after, _ = run.step(setup.fresh_state(run.parts))
    for state in (fresh, after):
        params = named_leaves(state.params)
        assert len(params) > 10
        for part in ("opt_state", "ema"):
            held = named_leaves(getattr(state, part))
            for name, param in params.items():
                found = [v for n, v in held.items() if n.endswith(name)]
                if name != "norm/scale":  # other names end with this one
                    assert len(found) == (2 if part == "opt_state" else 1), name
                for leaf in found:
                    same = leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)
                    assert same or name == "norm/scale", name
        moments = [
            v for n, v in named_leaves(state.opt_state).items() if "moe/experts/w" in n
        ]
        assert len(moments) == 6
        for leaf in moments:
            parts = {shard.data.size for shard in leaf.addressable_shards}
            assert parts == {leaf.size // 4}, "split over 2 fsdp and 2 expert shards"


def test_expert_weights_are_split_as_the_table_says(run):
    w_up = named_leaves(run.parts.abstract.params)[f"{EXPERTS}/w_up"]
    layers, experts, d_model, d_ff = w_up.shape
    assert (layers, experts, d_model, d_ff) == (2, 4, 32, 32)
    assert w_up.sharding.shard_shape(w_up.shape) == (2, 2, 16, 32)


def test_every_donated_buffer_is_deleted(run):
    state = setup.fresh_state(run.parts)
    leaves = jax.tree.leaves(state)
    run.step(state)
    assert [leaf.is_deleted() for leaf in leaves] == [True] * len(leaves)


def test_metrics_are_on_every_device(run, begun):
    _, metrics = run.step(run.place(begun))
    assert metrics["expert_counts"].shape == (2, 4)
    for name, value in metrics.items():
        assert value.sharding.is_fully_replicated, name
        assert len(value.addressable_shards) == 8, name


def nan_in(params, where):
    leaves = dict(named_leaves(params))
    leaves[where] = leaves[where].copy()
    leaves[where].flat[0] = np.nan
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


@pytest.mark.parametrize("cause", ["weights", "parameter", "nothing"])
def test_a_bad_step_changes_nothing(run, begun, same_bits, cause):
    changed = {}
    if cause == "weights":
        weights = random_batch(run.parts.config, "float32")["weights"]
        weights[3, 5] = np.inf
        changed = {"weights": weights}
    before = begun
    if cause == "parameter":
        before = dataclasses.replace(begun, params=nan_in(begun.params, "embedding"))
    state, metrics = run.step(run.place(before), **changed)
    after = jax.device_get(state)
    assert after.step == before.step + 1
    assert metrics["skipped"] == (cause != "nothing")
    stayed = same_bits(dataclasses.replace(after, step=before.step), before)
    assert stayed == (cause != "nothing")


def test_average_of_parameters(run):
    state = setup.fresh_state(run.parts)
    average = jax.tree.map(np.float64, jax.device_get(state.params))
    for _ in range(3):
        state, _ = run.step(state)
        params = jax.device_get(state.params)
        average = jax.tree.map(
            lambda a, p: EMA_DECAY * a + (1 - EMA_DECAY) * np.float64(p),
            average,
            params,
        )
    found = named_leaves(jax.device_get(state.ema))
    for name, value in named_leaves(average).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    w_up = found[f"{EXPERTS}/w_up"] - named_leaves(params)[f"{EXPERTS}/w_up"]
    assert np.abs(w_up).max() > 1e-3, "the average lags behind"


def test_learning_rate_of_the_metrics(run):
    """Warm-up of 5 steps to 1e-2."""
    state = setup.fresh_state(run.parts)
    rates = []
    for _ in range(3):
        state, metrics = run.step(state)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [2e-3, 4e-3, 6e-3], rtol=1e-6)
