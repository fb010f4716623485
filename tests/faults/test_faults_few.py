"""Two faults for the default run, and long ones that are no case of the matrix."""

import os
import re
import select
import socket
import threading
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
NEWEST = "--config.checkpoint.keep_last=2"


def test_a_store_that_fails_is_waited_for_and_a_hung_process_ends(runs, tmp_path):
    """The disk is full at step 4; then process 1 hangs in the evaluation at the end."""
    workdir = tmp_path / "run"
    full = {"kind": "full", "phase": "save", "step": 4, "process": -1, "secs": 2}
    ended = runs.run(
        workdir,
        "--config.eval.watchdog_secs=10",
        "--config.eval.every=0",
        # One process may write its part when the disk is free again, and waits for the
        # other for half of it.
        "--config.checkpoint.watchdog_secs=30",
        fault=[full | {"once": f"{workdir}.full"}, {"kind": "hang", "phase": "finish"}],
        options=["--restart=0"],
    )
    output = ended.output
    assert ended.status == 3, output
    # That of step 2 may not have been whole.
    said = r"WARNING: \S+ process \d: saving step [24] failed: \w+: .* checkpoint "
    assert re.search(said, output), output
    assert re.search(r"WARNING: .* is saved, after \d failures", output), output
    said = (
        r"watchdog: \S+ process \d: the final evaluation at step 10 has taken 1\d s, "
    )
    assert re.search(said + r"more than 10 s \(config.eval.watchdog_secs\)", output), (
        output
    )
    assert ended.seconds_to("watchdog: ") < 30 * runs.slack
    steps = [line[0] for line in runs.figures(workdir)]
    assert steps == list(range(1, 11)), "none is lost, the disk being full"
    assert (workdir / "checkpoints" / "10").is_dir()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_in_the_middle_of_a_save(runs, tmp_path):
    """SIGKILL of one of four processes, thirty times, and as many good resumes."""
    times = int(os.environ.get("FAULTS_KILLS", "30"))
    workdir = tmp_path / "run"
    steps = f"--config.train.steps={4 * times + 10}"
    every = "--config.eval.every=0"
    fault = {"kind": "kill_in_save", "phase": "save", "process": "turns"}
    fault |= {"after": 5, "times": times, "secs": 0.3}  # In its second save.
    ended = runs.run(
        workdir,
        *(steps, every, NEWEST),
        processes=4,
        fault=fault,
        options=[f"--restart={times + 5}", "--backoff=0"],
        timeout=3500,
    )
    assert ended.status == 0, ended.output
    killed = len(re.findall("ended with status 137", ended.output))
    resumes = [int(s) for s in re.findall(r"going on from step (\d+)", ended.output)]
    print(f"{killed} killed; went on from steps {resumes}")
    assert resumes == sorted(resumes) and "damaged" not in ended.output
    assert killed >= times and len(resumes) >= times
    quiet = runs.run(runs.folder / "four", steps, every, processes=4)
    assert quiet.status == 0, quiet.output
    assert runs.figures(workdir) == runs.figures(runs.folder / "four")


@pytest.mark.soak
def test_a_damaged_newest_checkpoint_is_passed_over(runs, quiet, tmp_path):
    workdir = tmp_path / "run"
    ended = runs.run(workdir, fault={"kind": "kill", "phase": "step", "step": 9})
    assert ended.status == 137, ended.output
    steps = [
        int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()
    ]
    newest = workdir / "checkpoints" / str(max(steps)) / "state"
    files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 200]
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    ended = runs.run(workdir)
    assert ended.status == 0, ended.output
    assert f"step {max(steps)} is damaged" in ended.output
    assert f"using step {max(steps) - 2}" in ended.output
    assert runs.figures(workdir) == quiet


@pytest.mark.soak
def test_a_last_save_that_never_succeeds_is_no_success(runs, quiet, tmp_path):
    workdir = tmp_path / "run"
    fault = {"kind": "read_only", "phase": "save", "step": 9, "process": 1}
    few = ("--config.checkpoint.retries=2", "--config.checkpoint.every=6")
    ended = runs.run(workdir, *few, fault=fault | {"secs": 1000})
    assert ended.status == 1, ended.output
    said = r"step 10 failed: OSError.*Read-only.* of step 6.*in a row: 3 .*the run ends"
    assert re.search(said, ended.output), ended.output
    ended = runs.run(workdir)
    assert ended.status == 0 and "going on from step 6" in ended.output
    assert runs.figures(workdir) == quiet


class Wire:
    """A proxy on loopback that can be cut: connections stay, and nothing passes."""

    def __init__(self, port):
        self.port, self.was_cut, self.cut_at = port, False, 0.0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            here, _ = self.server.accept()
            threading.Thread(target=self.join, args=(here,), daemon=True).start()

    def join(self, here):
        born = time.time()
        while True:  # Process 0 may listen later than this one calls.
            try:
                there = socket.create_connection(("127.0.0.1", self.port))
                break
            except OSError:
                time.sleep(0.1)
        pairs = {here: there, there: here}
        while True:
            ready, _, _ = select.select(list(pairs), [], [], 0.2)
            if self.was_cut and born < self.cut_at:
                continue  # Open, and silent.
            for end in ready:
                try:
                    data = end.recv(65536)
                    pairs[end].sendall(data)
                except OSError:
                    data = b""
                if not data:
                    here.close(), there.close()
                    return

    def cut(self):
        self.cut_at, self.was_cut = time.time(), True


@pytest.mark.soak
def test_a_lost_network_ends_the_run(runs, quiet, tmp_path):
    """Process 1 loses the coordinator: JAX' heartbeats end both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    wire, workdir = Wire(port), tmp_path / "run"
    # It is slow in a step, so that it is there when the wire is cut.
    fault = {"kind": "slow", "phase": "step", "step": 5, "secs": 100}
    fault |= {"coordinator": wire.address}
    child = runs.start(workdir, fault=fault, options=["--restart=1", f"--port={port}"])

    def cut():
        while not list(tmp_path.glob("run.fault*")) and child.poll() is None:
            time.sleep(0.1)
        wire.cut()

    threading.Thread(target=cut, daemon=True).start()
    ended = runs.end(child, workdir)
    assert ended.status == 0, ended.output
    assert "heartbeat" in ended.output and "restart 1 of 1" in ended.output
    took = ended.seconds_to("launch: status ")
    print(f"ended {took:.0f} s after the wire was cut")
    assert took < 75 * runs.slack
    assert runs.figures(workdir) == quiet
