"""Starting, stopping and failing, in processes of their own."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

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
    common.run(main, common.define_hosts)
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


def test_a_coordinator_that_does_not_answer():
    # Port 1 of this host: nobody listens there.
    result = python(
        "distributed.start(MeshConfig(), coordinator='127.0.0.1:1', num_processes=2,"
        "process_id=1)",
        MOE_JAX_START_SECS="2",
    )
    assert result.returncode == 3
    for part in ("process 1 of 2 (found by flags)", "127.0.0.1:1", "within 2 s"):
        assert part in result.stderr


@pytest.mark.parametrize("name", ["MOE_JAX_START_SECS", "MOE_JAX_HEARTBEAT_SECS"])
def test_times_that_are_none(name, monkeypatch):
    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match=f"{name}=0 in the environment: must be at"):
        distributed._seconds(name, 10)


def test_a_port_that_is_taken():
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = python(
            "common.run(lambda: distributed.start(MeshConfig(), process_id=0,"
            f"coordinator='127.0.0.1:{port}', num_processes=2), lambda: None, [], 'x')"
        )
    assert result.returncode == 1
    assert f"cannot listen on port {port}: Address already in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_says_that_srun_was_forgotten():
    result = python(
        "distributed.start(MeshConfig()); print(distributed.describe())",
        SLURM_NTASKS="16",
        SLURM_JOB_ID="7",
    )
    assert result.stdout == (
        "1 process (alone: SLURM has 16 tasks, but srun did not start this one), "
        "1 device of kind cpu\n"
    ), result.stderr


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
    found = "2 processes on 1 host (found by flags), 4 devices of kind cpu primary"
    assert f"[0] {found} True\n" in out and f"[1] {found} False\n" in out
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
