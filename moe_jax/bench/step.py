"""A train step at work: its time, what the host adds, what its input costs."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.bench import compiling
from moe_jax.bench.timing import Times
from moe_jax.config import Config
from moe_jax.data import pipeline
from moe_jax.observe import flops
from moe_jax.parallel import batches
from moe_jax.train import setup
from moe_jax.train.kinds import kind_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured; times are of this process.

    Attributes:
      compile_seconds: of each phase.
      step: from one step's results to the next one's, with its input.
      waiting: of these, what the host waited for rows (`next` of the pipeline).
      placing: what it took to make arrays over the mesh of them.
      idle_steps: steps before which the device was found without work.
      dispatch: processor time of the thread that calls the step, on an idle device.
      bare: the same of a plain `jax.jit` with as many leaves, in flat tuples.
      bare_trees: the same of one with the step's trees.
      returns: time until the step's call returns; where the devices are the host's
        own cores, they take them from the caller.
      leaves: in and out.
      tokens: of a step; of images their patches.
      mfu: None where the device's peak is not known.
      peak_bytes: most memory in use on a device; None where the backend keeps silent.
      program_bytes: what the compiler sets aside on a device, the state included.
      losses: of the first and of the last step.
    """

    compile_seconds: dict[str, float]
    step: Times
    waiting: Times
    placing: Times
    idle_steps: int
    dispatch: Times
    bare: Times
    bare_trees: Times
    returns: Times
    leaves: tuple[int, int]
    tokens: int
    mfu: float | None
    peak_bytes: int | None
    program_bytes: int | None
    losses: tuple[float, float]

    @property
    def waiting_share(self) -> float:
        """Of the time of all steps."""
        return sum(self.waiting.seconds) / sum(self.step.seconds)

    @property
    def host_ratio(self) -> float:
        return self.dispatch.median / self.bare.median


class Bench:
    """A config's step, compiled, with its state and its input.

    Raises:
      UserError: what the user can mend, as in training.
    """

    def __init__(self, config: Config):
        data = pipeline.prepare(config)
        kind_of(config).check(config, data)
        self.parts = setup.make_parts(config)
        self._compilation = compiling.compile_step(self.parts)
        self._run = self._compilation.program
        self._state = setup.fresh_state(self.parts)
        self._size = config.train.batch_size
        self._rows = batches.rows_of_process(self.parts.mesh, self._size)
        self._data = data
        self._losses: list[float] = []

    def measure(self, steps: int, warm_up: int, calls: int) -> Report:
        """Trains for `warm_up` + `steps` steps, then times `calls` lone calls."""
        step, waiting, placing, idle = self._train(steps, warm_up)
        calls_of, leaves = self._calls(calls)
        config, mesh = self.parts.config, self.parts.mesh
        per_row = self.parts.model.flops_per_row(config.positions())
        device = mesh.local_devices[0]
        return Report(
            compile_seconds=self._compilation.seconds,
            step=step,
            waiting=waiting,
            placing=placing,
            idle_steps=idle,
            **calls_of,
            leaves=leaves,
            tokens=self._size * config.positions(),
            mfu=flops.mfu(
                per_row * self._size, step.median, device.device_kind, mesh.size
            ),
            peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
            program_bytes=_program_bytes(self._run),
            losses=(self._losses[0], self._losses[-1]),
        )

    def _batches(self, steps: int) -> Iterator[Any]:
        return self._data.train_batches(
            batch_size=self._size,
            seed=self.parts.config.seed,
            start_step=0,
            num_steps=steps,
            rows=self._rows,
            prefetch=self.parts.config.data.prefetch,
        )

    def _train(self, steps: int, warm_up: int):
        """The loop of training: a step's metrics are read when the next is under way.

        Returns:
          Times of steps, of waiting for rows and of placing them, and before how many
          steps the device had nothing to do.
        """
        total = warm_up + steps
        found, idle, pending = [], 0, None
        rows = self._batches(total + 1)
        for number in range(total + 1):
            began = time.perf_counter()
            row = next(rows)
            got = time.perf_counter()
            batch = batches.put(row, self.parts.mesh, self._size, self._rows[0])
            placed = time.perf_counter()
            if pending is not None:
                idle += number > warm_up and pending["loss"].is_ready()
            self._state, metrics = self._run(self._state, batch)
            if pending is not None:
                self._losses.append(float(jax.device_get(pending)["loss"]))
            now = time.perf_counter()
            found.append((now, got - began, placed - got))
            pending = metrics
        jax.block_until_ready(self._state)
        self._batch = batch
        ends, waits, places = zip(*found, strict=True)
        timed = slice(warm_up + 1, None)
        lasted = tuple(b - a for a, b in itertools.pairwise(ends[warm_up:]))
        return Times(lasted), Times(waits[timed]), Times(places[timed]), idle

    def _calls(self, calls: int) -> tuple[dict[str, Times], tuple[int, int]]:
        """Calls on an idle device in turn: the step's, and those of bare jits.

        All take and give the same arrays, the bare ones as flat tuples or as the
        step's trees. On a CPU the work of the devices slows the caller: each call
        follows a step, which leaves nothing of the caller's in the caches, and the
        bare ones have work too.

        Returns:
          Times by the names of `Report`, and the number of leaves in and out.
        """
        state, batch = self._state, self._batch
        leaves, tree = jax.tree.flatten(state)
        given, metrics = tuple(jax.tree.leaves(batch)), self._run.out_info[1]
        flat_metrics = tuple(jax.tree.leaves(metrics))
        one = self.parts.shardings.step
        places = tuple(leaf.sharding for leaf in leaves)
        flat = _bare(flat_metrics, (places, (one,) * len(flat_metrics)))
        in_trees = _bare(metrics, (self.parts.shardings, one))
        taken = {"dispatch": [], "bare": [], "bare_trees": [], "returns": []}
        for number in range(calls + 1):
            state, own, wall = _call(self._run, state, batch)
            rows, of_flat, _ = _call(flat, tuple(jax.tree.leaves(state)), given)
            state, _, _ = _call(self._run, jax.tree.unflatten(tree, rows), batch)
            state, of_trees, _ = _call(in_trees, state, batch)
            state, _, _ = _call(self._run, state, batch)
            if number:  # The first compiles.
                found = (own, of_flat, of_trees, wall)
                for name, seconds in zip(taken, found, strict=True):
                    taken[name].append(seconds)
        self._state = state
        counts = len(leaves) + len(given), len(leaves) + len(flat_metrics)
        return {name: Times(tuple(s)) for name, s in taken.items()}, counts


def _bare(metrics, places):
    """A jit of `(state, batch) -> state, metrics` that only passes the state on."""

    def pass_on(state, batch):
        kept, done = jax.lax.optimization_barrier((state, _some_work()))
        full = lambda m: jnp.full(m.shape, done, m.dtype)
        return kept, jax.tree.map(full, metrics)

    return jax.jit(pass_on, donate_argnums=0, out_shardings=places)


def _some_work() -> jax.Array:
    """() float, after a few milliseconds of a CPU's time."""
    square = jax.lax.optimization_barrier(jnp.ones((256, 256)))
    work = lambda _, x: x @ square / 256
    return jax.lax.fori_loop(0, 100, work, square)[0, 0]


def _call(run, state, batch):
    """The new state, and the call's processor time and time."""
    wall, own = time.perf_counter(), time.thread_time()
    out = run(state, batch)
    own, wall = time.thread_time() - own, time.perf_counter() - wall
    jax.block_until_ready(out)
    return out[0], own, wall


def _program_bytes(program: jax.stages.Compiled) -> int | None:
    found = program.memory_analysis()
    if found is None:
        return None
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + kept + found.temp_size_in_bytes
