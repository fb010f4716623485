"""Metrics on disk survive crashes, resumes and figures that are not finite."""

import errno
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.observe import summary, writers


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_values_become_valid_json(tmp_path):
    with writers.MetricsFile(tmp_path / "deep" / "metrics.jsonl") as file:
        file.write(
            3,
            {
                "nan": math.nan,
                "inf": np.float32(np.inf),
                "bf16": jnp.asarray(1.5, jnp.bfloat16),
                "load": np.array([[1, 2], [3, 4]]),
                "floats": np.array([0.5, np.nan]),
                "flag": np.bool_(True),
            },
        )
        line = (tmp_path / "deep" / "metrics.jsonl").read_text()  # before close
    assert strict(line) == {
        "step": 3,
        "nan": None,
        "inf": None,
        "bf16": 1.5,
        "load": [[1, 2], [3, 4]],
        "floats": [0.5, None],
        "flag": True,
    }


def test_cut_back_drops_later_steps_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with writers.MetricsFile(path) as file:
        for step in range(1, 6):
            file.write(step, {"loss": float(step)})
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with writers.MetricsFile(path) as file:
        assert file.cut_back(3) == 2
        file.write(4, {"loss": -4.0})
    lines = path.read_text().splitlines()
    assert [strict(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert strict(lines[-1])["loss"] == -4.0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_append_after_a_torn_line_keeps_the_new_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with writers.MetricsFile(path) as file:
        file.write(2, {"loss": 1.0})
    assert [e["step"] for e in writers.read_metrics(path)] == [1, 2]


def test_cut_back_of_an_empty_file(tmp_path):
    with writers.MetricsFile(tmp_path / "metrics.jsonl") as file:
        assert file.cut_back(0) == 0


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    writers.write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        writers.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_tensorboard_is_read_back(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    board = writers.TensorBoard(tmp_path / "tb")
    board.scalars(0, {"text": "x", "array": [1, 2]})
    assert not (tmp_path / "tb").exists()
    for step in (1, 2, 3):
        board.scalars(step, {"loss": np.float32(step), "nothing": None})
        board.histogram(step, "load", np.array([1.0, 2.0, 5.0]))
    board.close()
    resumed = writers.TensorBoard(tmp_path / "tb", resume_step=1)
    resumed.scalars(2, {"loss": 20.0})
    resumed.close()
    everything = {"scalars": 0, "histograms": 0}
    events = accumulator.EventAccumulator(str(tmp_path / "tb"), everything)
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    # What stood after step 1 is hidden by the resume.
    assert [e.step for e in events.Histograms("load")] == [1]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 20)]


def test_summary_has_versions_and_valid_json(tmp_path):
    path = tmp_path / "summary.json"
    summary.write_summary(path, {"step": 5, "losses": {"train": math.nan}})
    data = strict(path.read_text())
    assert data["losses"] == {"train": None}
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} < set(
        data["versions"]
    )
    assert data["versions"]["platform"] == "cpu"
    assert "not installed" not in data["versions"].values()


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def test_lines_wait_while_the_disk_is_full(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    file = writers.MetricsFile(path)
    file.write(1, {"loss": 1.0})
    disk = file._file = FullDisk(file._file, room=7)
    for step in (2, 3):  # Seven bytes of the first of them are written.
        file.write(step, {"loss": float(step)})
    assert [line["step"] for line in writers.read_metrics(path)] == [1]
    assert capsys.readouterr().err.count("WARNING") == 1
    disk.room = 10**6
    file.flush()
    assert len(path.read_text().splitlines()) == 3
    file.write(4, {"loss": 4.0})
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [
        *(1, 2, 3, 4),
    ]
    disk.room = 0
    file.write(5, {"loss": 5.0})
    with pytest.raises(OSError, match="No space"):
        file.close()


def test_tensorboard_goes_on_when_its_thread_has_ended(tmp_path, monkeypatch):
    board = writers.TensorBoard(tmp_path)
    board.scalars(1, {"loss": 1.0})
    worker = board._writer.file_writer.event_writer._worker
    worker.stop()  # What a full disk does to it.
    for step in range(2, 60):  # More than its queue holds.
        board.scalars(step, {"loss": float(step)})
    board.close()
    assert len(list(tmp_path.iterdir())) == 2
