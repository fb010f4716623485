"""Starting, stopping and failing, in processes of their own."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from moe_jax.config import MeshConfig
from moe_jax.errors import UserError
from moe_jax.parallel import distributed

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = ROOT / "launch" / "local.py"

HEAD = """
import os, signal, sys, time
from moe_jax.cli import common
from moe_jax.config import MeshConfig
from moe_jax.parallel import distributed
"""

COMMAND = (
    HEAD
    + """
def main():
    distributed.start(MeshConfig(data=2, expert=2))
    import jax
    index = jax.process_index()
    print(distributed.describe(), "primary", distributed.is_primary(), flush=True)
    distributed.barrier("ready")
    {body}
if __name__ == "__main__":
    common.run(main, lambda: None)
"""
)


def environment(**extra):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    return env | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | extra


def python(code, *, timeout=60, **extra):
    return subprocess.run(
        [sys.executable, "-c", HEAD + code],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def launch(tmp_path):
    """Starts a command on two processes through launch/local.py."""
    started = []

    def begin(body, *options):
        script = tmp_path / "script.py"
        script.write_text(COMMAND.replace("{body}", body))
        child = subprocess.Popen(
            [
                *(sys.executable, LOCAL, "-n", "2", "--timeout=90", *options),
                *("--", sys.executable, str(script)),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child

    yield begin
    for child in started:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGTERM)
            child.wait(timeout=20)


@pytest.mark.parametrize(
    "mesh, extra, expected",
    [
        ("data=2, expert=3", {}, 6),
        ("data=-1, expert=4", {}, 4),
        ("", {}, 1),
        ("expert=4", {"MOE_JAX_LOCAL_DEVICES": "3"}, 3),
        ("expert=4", {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, 2),
    ],
)
def test_makes_the_cpu_devices_of_the_mesh(mesh, extra, expected):
    result = python(
        f"distributed.start(MeshConfig({mesh})); import jax\n"
        "print(jax.device_count(), distributed.describe())",
        **extra,
    )
    assert result.stdout.split()[0] == str(expected), result.stderr
    assert "1 process, " in result.stdout and "of kind cpu" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"coordinator": "a:1"}, "--num_processes, --process_id missing"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "--process_id=2: must be below --num_processes=2",
        ),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
    ],
)
def test_refuses_half_an_address(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        distributed.start(MeshConfig(), **arguments)


def test_environment_that_is_no_number(monkeypatch):
    monkeypatch.setenv("MOE_JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="MOE_JAX_NUM_PROCESSES='two'"):
        distributed.start(MeshConfig())


def test_names_the_cluster(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed._cluster() == ""
    for name in ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert distributed._cluster() == ""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert distributed._cluster() == "slurm"
    monkeypatch.delenv("SLURM_PROCID")  # a login shell, not srun
    assert distributed._cluster() == ""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1.0;tcp://10.0.0.1:1")
    assert distributed._cluster() == "openmpi"


def test_watchdog_ends_a_stuck_process():
    begin = time.monotonic()
    result = python(
        "dog = distributed.Watchdog(0.5, 'host a process 1')\n"
        "dog.beat('train step', 7)\n"
        "time.sleep(50)"
    )
    assert result.returncode == 3
    assert time.monotonic() - begin < 30
    assert "watchdog: host a process 1: train step at step 7 has taken" in result.stderr
    assert "line 8 in <module>" in result.stderr  # the stack: where it slept


def test_watchdog_lets_beats_and_pauses_live():
    result = python(
        # Five times as patient as it must be: other tests run at the same time.
        "dog = distributed.Watchdog(1, 'x'); time.sleep(1.5)\n"  # not yet armed
        "for _ in range(8): dog.beat('step'); time.sleep(0.2)\n"
        "dog.pause(); time.sleep(1.5); dog.beat('step'); dog.stop(); time.sleep(1.5)\n"
        "off = distributed.Watchdog(0, 'x'); off.beat('step'); time.sleep(0.5)\n"
        "print('alive')"
    )
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr


def test_stop_signals_in_one_process():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with distributed.StopSignals() as stop:
        assert not stop.should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.should_stop(2) and stop.requested == "SIGTERM"
    with distributed.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.should_stop(1) and stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert before == (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
    )


@pytest.mark.multiprocess
def test_two_processes(launch):
    child = launch("print('done', index)")
    out, err = child.communicate(timeout=100)
    assert (child.returncode, err) == (0, ""), out
    assert "[0] 2 processes, 4 devices of kind cpu primary True\n" in out
    assert "[1] 2 processes, 4 devices of kind cpu primary False\n" in out
    assert "[0] done 0\n" in out and "[1] done 1\n" in out


@pytest.mark.multiprocess
def test_a_process_that_ends_late_is_waited_for(launch):
    # Longer than the shutdown timeout of ten seconds.
    child = launch("time.sleep(14 * (1 - index)); print('done', index)")
    out, _ = child.communicate(timeout=100)
    assert child.returncode == 0, out
    assert "[0] done 0\n" in out


@pytest.mark.multiprocess
def test_an_exception_in_one_process_ends_all(launch):
    begin = time.monotonic()
    child = launch(
        "if index: raise RuntimeError('boom')\n    time.sleep(80)", "--grace=1"
    )
    out, err = child.communicate(timeout=100)
    assert child.returncode == 1
    assert time.monotonic() - begin < 40
    assert "[1] RuntimeError: boom" in out
    assert "process 1 ended with status 1: ending the others" in err


STOP_LOOP = """
    with distributed.StopSignals() as stop:
        for step in range(2000):
            if index == 0 and step == 3: print("stepping", flush=True)
            distributed.barrier("step")
            time.sleep(0.01)
            if stop.should_stop(step): break
    print("stopped at", step, stop.requested)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_stop_after_the_same_step(launch, number):
    child = launch(STOP_LOOP)
    for line in child.stdout:
        if "stepping" in line:
            break
    child.send_signal(number)
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, out + err
    stops = re.findall(r"\[(\d)\] stopped at (\d+) ", out)
    assert sorted(i for i, _ in stops) == ["0", "1"]
    assert stops[0][1] == stops[1][1] and int(stops[0][1]) < 1999


def run_local(*arguments, timeout=60):
    return subprocess.run(
        [sys.executable, LOCAL, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_launcher_timeout_kills_what_ignores_sigterm():
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('up', flush=True); time.sleep(50)"
    )
    begin = time.monotonic()
    result = run_local(
        "-n", "2", "--timeout=1.5", "--grace=0.5", "--", sys.executable, "-c", code
    )
    assert result.returncode == 124
    assert "not done after --timeout=1.5 s" in result.stderr
    assert time.monotonic() - begin < 20


def test_launcher_environment():
    code = (
        "import os; e = os.environ; print(e['MOE_JAX_PROCESS_ID'],"
        "e['MOE_JAX_NUM_PROCESSES'], e['MOE_JAX_LOCAL_DEVICES'], e['NPROC'])"
    )
    result = run_local(
        "-n", "2", "--devices-per-process=20", "--", sys.executable, "-c", code
    )
    assert result.returncode == 0
    threads = max(40, os.cpu_count() or 1)
    assert sorted(result.stdout.splitlines()) == [
        f"[0] 0 2 20 {threads}",
        f"[1] 1 2 20 {threads}",
    ]


def test_launcher_bad_input():
    assert "no command" in run_local("-n", "2").stderr
    result = run_local("-n", "2", "--", "no-such-command-here")
    assert result.returncode == 2 and "cannot start" in result.stderr
    assert run_local("-n", "1", "--", "false").returncode == 1
    assert "moe-jax train" in run_local("--help").stdout
