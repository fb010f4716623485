"""A process that is stuck ends, and says where."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from moe_jax.config import Config
from moe_jax.parallel import watchdog

ROOT = pathlib.Path(__file__).parents[2]
HEAD = """
import ctypes, sys, time
from moe_jax.parallel.watchdog import PHASES, Watchdog
limits = dict.fromkeys(PHASES, 0.0)
"""


def python(code, **options):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HEAD + code]
    return subprocess.run(
        command, env=env, text=True, timeout=100, stderr=subprocess.PIPE, **options
    )


def test_every_phase_has_a_limit_in_the_config():
    config = Config()
    config.eval.watchdog_secs = 5.0
    found = watchdog.limits(config)
    assert found.keys() == watchdog.PHASES.keys()
    assert (found["evaluate"], found["finish"], found["step"]) == (5, 5, 600)
    assert all(limit > 0 for limit in found.values()), "none may hang for ever"


def test_ends_a_stuck_process():
    begin = time.monotonic()
    result = python(
        "limits |= {'step': 0.5, 'compile': 100}\n"
        "dog = Watchdog(limits, 'host a process 1')\n"
        "dog.beat('compile'); time.sleep(1)\n"
        "dog.beat('step', 7)\n"
        "time.sleep(50)"
    )
    assert result.returncode == 3
    assert time.monotonic() - begin < 30
    expected = "watchdog: host a process 1: training at step 7 has taken "
    assert expected in result.stderr
    assert "more than 0.5 s (config.train.watchdog_secs)" in result.stderr
    assert "line 9 in <module>" in result.stderr  # the stack: where it slept


@pytest.mark.parametrize(
    "beats",
    [
        "dog.beat('step', 3); time.sleep(1)",
        # As a phase begins: the thread that watches knows the limit of the one before.
        "dog.beat('restore'); time.sleep(1); dog.beat('step', 3)",
    ],
)
def test_ends_a_process_that_holds_the_interpreter(beats):
    begin = time.monotonic()
    result = python(
        "limits |= {'restore': 3600.0, 'step': 2.0}\n"
        f"dog = Watchdog(limits, 'x'); {beats}\n"
        "ctypes.PyDLL(None).sleep(60)"
    )
    assert result.returncode == 1
    assert time.monotonic() - begin < 40
    assert "Timeout" in result.stderr and "line 7 in <module>" in result.stderr


def test_ends_where_nobody_reads_its_message():
    read, write = os.pipe()
    begin = time.monotonic()
    child = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            HEAD + "limits |= {'step': 0.5}\n"
            "sys.__stderr__.write('x' * 65536); sys.__stderr__.flush()\n"
            "Watchdog(limits, 'x').beat('step'); time.sleep(60)",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stderr=write,
    )
    assert child.wait(timeout=50) == 3
    assert time.monotonic() - begin < 45
    os.close(read), os.close(write)


@pytest.mark.parametrize("secs", [1.0, 0.0])
def test_lets_the_living_live(secs):
    result = python(
        # Five times as patient as it must be: other tests run at the same time.
        f"limits |= {{'step': {secs}, 'wait': {secs}}}\n"
        "with Watchdog(limits, 'x') as dog:\n"
        "    time.sleep(1.2)\n"  # "start" has no limit here
        "    for _ in range(8): dog.beat('step'); time.sleep(0.2)\n"
        "    dog.beat('compile'); time.sleep(1.2); dog.beat('wait')\n"
        "time.sleep(1.5)\n"  # stopped
        "print('alive')",
        stdout=subprocess.PIPE,
    )
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr
