"""Two processes save and restore together, also when the newest step is damaged.

And when one cannot write its part.
"""

import pathlib
import socket

import pytest

PROCESS = str(pathlib.Path(__file__).with_name("process.py"))


@pytest.mark.multiprocess
def test_two_processes(tmp_path, python):
    folder = tmp_path / "checkpoints"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    running = [python(PROCESS, str(rank), port, str(folder)) for rank in (0, 1)]
    try:
        for rank, process in enumerate(running):
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            assert output.endswith(f"fine {rank}\n")  # Gloo prints too.
    finally:
        for process in running:
            process.kill()
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3", "4", "set_aside"]
