"""Two processes save and restore together, also when the newest step is damaged."""

import pathlib
import socket

import pytest

PROCESS = str(pathlib.Path(__file__).with_name("process.py"))


@pytest.mark.multiprocess
def test_two_processes(tmp_path, python):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    running = [python(PROCESS, str(rank), port, str(tmp_path)) for rank in (0, 1)]
    try:
        for rank, process in enumerate(running):
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            assert output.endswith(f"fine {rank}\n")  # Gloo prints too.
    finally:
        for process in running:
            process.kill()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "set_aside"]
