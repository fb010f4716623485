"""Every fault in every phase: how it ends, how soon, and that the run is the same.

Two processes train ten steps. The fault strikes once, in one of them, at the beginning
of a phase. In the end all steps are there, with the losses of a quiet run, to the bit.
`python -m pytest tests/faults -m soak -s` prints the table of docs/faults.md.
"""

import dataclasses
import re
import shutil

import pytest

from moe_jax.parallel import watchdog

pytestmark = [pytest.mark.multiprocess]

PHASES = ("connect", "restore", "compile", "step", "save", "evaluate", "finish")
# Longest times in seconds from the fault to the end of all processes.
HEARTBEAT, WATCHDOG, AT_ONCE = 75, 35, 20
_LIMIT = 20  # Of the phase that is struck.


@dataclasses.dataclass(frozen=True)
class Case:
    """A fault and what it does.

    Attributes:
      kind: of hook/sitecustomize.py.
      phase: in which it strikes.
      end: "restart": all processes end, and a restart finishes the run; "on": the
        run goes on; "stop": all save and end with status 0.
      within: seconds until all processes have ended, on a machine that is not busy.
      says: what the output must hold, a pattern.
      process: that it strikes.
      changes: of the config.
      fault: more for the hook.
    """

    kind: str
    phase: str
    end: str
    within: float = 0
    says: str = ""
    process: int = 1
    changes: tuple[str, ...] = ()
    fault: tuple[tuple[str, object], ...] = ()

    def __str__(self):
        first = "" if self.process == 1 else f"{self.process}-"
        return f"{self.kind}-{first}{self.phase}"


def matrix():
    running = PHASES[1:]
    for phase in PHASES:
        yield Case("kill", phase, "restart", AT_ONCE, "status 137")
        yield Case("exception", phase, "restart", AT_ONCE, "RuntimeError: boom")
        said = (
            "not all processes met" if phase == "connect" else "watchdog: .* has taken"
        )
        yield Case("hang", phase, "restart", WATCHDOG, said)
    for phase in running:
        yield Case("kill", phase, "restart", AT_ONCE, "status 137", process=0)
        yield Case("memory", phase, "restart", AT_ONCE, "MemoryError")
        yield Case("abort", phase, "restart", AT_ONCE, "status 134")
        yield Case("exit", phase, "restart", HEARTBEAT)
        yield Case("stop", phase, "restart", HEARTBEAT)
        yield Case("hold", phase, "restart", HEARTBEAT)
        yield Case("slow", phase, "on", fault=(("secs", 8),))
        if phase != "finish":
            yield Case("term", phase, "stop", 30, "SIGTERM: stopped after step")
    yield Case("term", "finish", "on")  # It is finished.
    yield Case("term", "connect", "restart", AT_ONCE, "status 143")
    yield Case("int", "step", "stop", 30, "SIG(INT|TERM): stopped after step")
    yield Case("clock", "all", "on", fault=(("secs", 5 * 3600),))
    yield Case("clock", "all", "on", process=0, fault=(("secs", -5 * 3600),))
    said = "saving step 4 failed: .*; the newest checkpoint is that of step 2"
    for kind in ("full", "read_only"):
        for process in (-1, 0, 1):
            yield Case(kind, "save", "on", 0, said, process=process)
    nan = "step 5: the loss or a gradient is not finite"
    stop = ("--config.train.nan_policy=stop",)
    yield Case("nan", "step", "restart", AT_ONCE, nan, changes=stop)
    other = r"step 4: copies of the state that must be equal differ[^$]*process 1"
    yield Case("corrupt", "agree", "restart", AT_ONCE, other)


@pytest.mark.soak
@pytest.mark.parametrize("case", list(matrix()), ids=str)
def test_fault(runs, quiet, tmp_path, case):
    check(runs, quiet, tmp_path / "run", case)


def check(runs, quiet, workdir, case):
    late = case.phase in ("step", "save", "evaluate", "agree")
    fault = dict(case.fault) | {
        "kind": case.kind,
        "process": case.process,
        "phase": case.phase,
        "step": 4 if late else 0,
    }
    changes = case.changes
    if case.phase in PHASES[1:]:
        field = watchdog.PHASES[case.phase][1]
        changes += (f"--config.{field}={_LIMIT * runs.slack:g}",)
    env = {"MOE_JAX_START_SECS": "20"} if case.phase == "connect" else {}
    options = ["--restart=1"]
    ended = runs.run(workdir, *changes, fault=fault, options=options, env=env)
    assert ended.status == 0, ended.output
    restarts = ended.output.count("launch: status ")
    assert restarts == (case.end == "restart"), ended.output
    assert re.search(case.says, ended.output), ended.output
    took = 0.0
    if case.kind != "clock":
        assert ended.struck, "the fault did not strike"
    if case.end == "restart":
        took = ended.seconds_to("launch: status ")
        assert took < case.within * runs.slack, f"{took:.0f} s\n{ended.output}"
    if case.end == "stop" and "stopped after step 10" not in ended.output:
        again = runs.run(workdir, *changes)
        assert again.status == 0 and "going on from step" in again.output
    assert runs.figures(workdir) == quiet
    print(f"| {case} | {case.end} | {took:.0f} s |")
    shutil.rmtree(workdir)
