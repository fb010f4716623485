"""Training, from top to bottom."""

import dataclasses
import os
import time
from typing import Any

import jax

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Config
from moe_jax.data import pipeline
from moe_jax.observe.summary import write_summary
from moe_jax.parallel import batches, distributed
from moe_jax.train import restore, setup, workdir
from moe_jax.train.kinds import kind_of
from moe_jax.train.recorder import Recorder
from moe_jax.train.setup import Parts


@dataclasses.dataclass
class Progress:
    """How far a run has come, and what it took.

    Attributes:
      state: the train state.
      step: optimizer steps done.
      compile_seconds: of the train step.
      stopped_by: name of the signal that ended the run early, or "".
    """

    state: Any
    step: int
    compile_seconds: float = 0.0
    stopped_by: str = ""


def train(config: Config, folder: str) -> int:
    """Trains, or goes on where `folder` stopped; returns the exit status.

    Raises:
      UserError: what the user can mend.
      RunError: the run cannot go on.
    """
    setup.use_compilation_cache(config)
    data = pipeline.prepare(config)
    kind_of(config).check(config, data)
    parts = setup.make_parts(config)
    checkpoints = Checkpoints(
        workdir.checkpoint_folder(folder, config),
        config.checkpoint,
        experts=parts.experts,
    )
    try:
        changed = []
        if checkpoints.steps():
            changed = workdir.check_resume(folder, config)
        if distributed.is_primary():
            workdir.claim(folder, config)
        state, notes, saved = restore.begin(parts, data, checkpoints)
        return _run(parts, data, checkpoints, folder, state, changed, notes, saved)
    finally:
        checkpoints.close()


def _run(parts, data, checkpoints, folder, state, changed, notes, saved) -> int:
    progress = Progress(state=state, step=int(state.step))
    kind = kind_of(parts.config)
    recorder = Recorder(parts, folder, progress.step, kind, kind.of_loss(data), saved)
    evaluator = kind.evaluator(parts, data)
    try:
        for line in _greeting(parts, data, changed, notes):
            recorder.console.note(line)
        _steps(parts, data, checkpoints, recorder, evaluator, progress)
        checkpoints.wait()
        if progress.stopped_by:
            recorder.console.note(
                f"{progress.stopped_by}: stopped after step {progress.step}, "
                "checkpoint saved; the same command goes on"
            )
            return 0
        figures = kind.finish(parts, data, evaluator, recorder, progress, folder)
        if distributed.is_primary():
            write_summary(os.path.join(folder, workdir.SUMMARY_FILE), figures)
    finally:
        recorder.close()
    return 0


def _steps(parts, data, checkpoints, recorder, evaluator, progress) -> None:
    """Runs the steps that remain; leaves the last state in `progress`."""
    config = parts.config
    if progress.step >= config.train.steps:
        return
    with distributed.StopSignals() as signals:
        begin = time.perf_counter()
        run_step = setup.compile_step(parts)
        progress.compile_seconds = time.perf_counter() - begin
        size = config.train.batch_size
        first, count = batches.rows_of_process(parts.mesh, size)
        host_batches = data.train_batches(
            batch_size=size,
            seed=config.seed,
            start_step=progress.step,
            num_steps=config.train.steps - progress.step,
            rows=(first, count),
            prefetch=config.data.prefetch,
            numbered=config.train.ledger,
        )
        host_batches = recorder.in_ledger(host_batches, first, data.identify)
        watchdog = distributed.Watchdog(config.train.watchdog_secs)
        recorder.restart_clock()
        for host_batch in host_batches:
            watchdog.beat("training", progress.step)
            batch = batches.put(host_batch, parts.mesh, size, first)
            progress.state, metrics = run_step(progress.state, batch)
            progress.step += 1
            recorder.add(progress.step, metrics)
            stop = signals.should_stop(progress.step)
            last = stop or progress.step == config.train.steps
            if last or progress.step % config.checkpoint.every == 0:
                watchdog.beat("saving a checkpoint", progress.step)
                recorder.flush()
                position = restore.data_position(parts, data, progress.step)
                beside = position | recorder.loads.saved()
                checkpoints.save(progress.step, progress.state, beside, force=last)
                recorder.restart_clock()
            if stop:
                progress.stopped_by = signals.requested
                break
            every = config.eval.every
            if every and progress.step % every == 0 and not last:
                watchdog.pause()
                recorder.flush()
                most = config.eval.max_batches
                figures = evaluator.score(progress.state, data, most)
                recorder.held_out(progress.step, figures)
                recorder.restart_clock()
        watchdog.stop()


def _greeting(parts: Parts, data: Any, changed: list[str], notes: list[str]):
    sizes = ", ".join(f"{k}={v}" for k, v in parts.mesh.shape.items() if v > 1)
    yield f"{distributed.describe()}; mesh {sizes or 'of one device'}"
    total, active = parts.model.count_parameters()
    yield f"model: {total:,} parameters, {active:,} of them active for a token"
    rows = parts.config.train.batch_size // parts.config.train.accumulation
    with jax.set_mesh(parts.mesh):
        yield from parts.model.notes(rows, parts.config.positions())
    yield data.describe()
    for line in changed:
        yield f"changed since this run began: {line}"
    yield from notes
