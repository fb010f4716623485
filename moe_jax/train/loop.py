"""Training, from top to bottom."""

import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any

import jax

from moe_jax.checkpoint import Checkpoints, Saver
from moe_jax.config import Config
from moe_jax.data import pipeline
from moe_jax.observe.summary import write_summary
from moe_jax.parallel import batches, distributed
from moe_jax.parallel.watchdog import Watchdog, limits
from moe_jax.train import restore, setup, workdir
from moe_jax.train.agreement import Agreement
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What the steps of a run need."""

    parts: Parts
    data: Any
    saver: Saver
    recorder: Recorder
    evaluator: Any
    watchdog: Watchdog

    @property
    def config(self) -> Config:
        return self.parts.config


def train(config: Config, folder: str) -> int:
    """Trains, or goes on where `folder` stopped; returns the exit status.

    Raises:
      UserError: what the user can mend.
      RunError: the run cannot go on.
    """
    with Watchdog(limits(config)) as watchdog:
        status = _train(config, folder, watchdog)
        watchdog.beat("leave")
        distributed.barrier("end of training")
    return status


def _train(config: Config, folder: str, watchdog: Watchdog) -> int:
    setup.use_compilation_cache(config)
    watchdog.beat("prepare")
    data = pipeline.prepare(config)
    kind_of(config).check(config, data)
    watchdog.beat("start")
    parts = setup.make_parts(config)
    found = distributed.describe()
    watchdog.beat("restore")
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
        progress = Progress(state=state, step=int(state.step))
        del state
        kind = kind_of(config)
        recorder = Recorder(
            parts, folder, progress.step, kind, kind.of_loss(data), saved
        )
        beat = lambda: watchdog.beat("save", progress.step)
        run = _Run(
            parts=parts,
            data=data,
            saver=Saver(checkpoints, config.checkpoint, beat),
            recorder=recorder,
            evaluator=kind.evaluator(parts, data),
            watchdog=watchdog,
        )
        try:
            for line in _greeting(found, parts, data, changed, notes):
                recorder.console.note(line)
            return _run(run, folder, progress)
        finally:
            recorder.close()
    finally:
        checkpoints.close()


def _run(run: _Run, folder: str, progress: Progress) -> int:
    _steps(run, progress)
    if progress.stopped_by:
        run.recorder.console.note(
            f"{progress.stopped_by}: stopped after step {progress.step}, "
            "checkpoint saved; the same command goes on"
        )
        return 0
    run.watchdog.beat("finish", progress.step)
    figures = kind_of(run.config).finish(
        run.parts, run.data, run.evaluator, run.recorder, progress, folder
    )
    if distributed.is_primary():
        write_summary(os.path.join(folder, workdir.SUMMARY_FILE), figures)
    return 0


def _steps(run: _Run, progress: Progress) -> None:
    """Runs the steps that remain; leaves the last state in `progress`."""
    config, parts, watchdog = run.config, run.parts, run.watchdog
    if progress.step >= config.train.steps:
        return
    with distributed.StopSignals() as signals:
        watchdog.beat("compile")
        begin = time.perf_counter()
        run_step = setup.compile_step(parts)
        progress.compile_seconds = time.perf_counter() - begin
        size = config.train.batch_size
        first, count = batches.rows_of_process(parts.mesh, size)
        watchdog.beat("wait", progress.step)
        host_batches = run.data.train_batches(
            batch_size=size,
            seed=config.seed,
            start_step=progress.step,
            num_steps=config.train.steps - progress.step,
            rows=(first, count),
            prefetch=config.data.prefetch,
            numbered=config.train.ledger,
        )
        host_batches = run.recorder.in_ledger(host_batches, first, run.data.identify)
        agreement = Agreement(parts, config.train.agree_every)
        run.recorder.restart_clock()
        for host_batch in host_batches:
            watchdog.beat("step", progress.step)
            batch = batches.put(host_batch, parts.mesh, size, first)
            progress.state, metrics = run_step(progress.state, batch)
            progress.step += 1
            run.recorder.add(progress.step, metrics)
            stop = signals.should_stop(progress.step)
            last = stop or progress.step == config.train.steps
            if agreement.due(progress.step):
                watchdog.beat("agree", progress.step)
                agreement.check(progress.step, progress.state)
            _save(run, progress, last)
            if stop:
                progress.stopped_by = signals.requested
                break
            every = config.eval.every
            if every and progress.step % every == 0 and not last:
                _evaluate(run, progress)
            watchdog.beat("wait", progress.step)


def _save(run: _Run, progress: Progress, last: bool) -> None:
    run.watchdog.beat("save", progress.step)
    if not run.saver.due(progress.step, last):
        return
    run.recorder.flush()
    position = restore.data_position(run.parts, run.data, progress.step)
    beside = position | run.recorder.loads.saved()
    run.saver.save(progress.step, progress.state, beside, last=last)
    if last:  # There may have been no space for its lines before.
        run.recorder.flush()
    run.recorder.restart_clock()


def _evaluate(run: _Run, progress: Progress) -> None:
    run.watchdog.beat("evaluate", progress.step)
    run.recorder.flush()
    most = run.config.eval.max_batches
    figures = run.evaluator.score(progress.state, run.data, most)
    run.recorder.held_out(progress.step, figures)
    run.recorder.restart_clock()


def _greeting(
    found: str, parts: Parts, data: Any, changed: list[str], notes: list[str]
) -> Iterator[str]:
    sizes = ", ".join(f"{k}={v}" for k, v in parts.mesh.shape.items() if v > 1)
    yield f"{found}; mesh {sizes or 'of one device'}"
    total, active = parts.model.count_parameters()
    yield f"model: {total:,} parameters, {active:,} of them active for a token"
    rows = parts.config.train.batch_size // parts.config.train.accumulation
    with jax.set_mesh(parts.mesh):
        yield from parts.model.notes(rows, parts.config.positions())
    yield data.describe()
    for line in changed:
        yield f"changed since this run began: {line}"
    yield from notes
