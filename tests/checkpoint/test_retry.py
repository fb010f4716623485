"""Saves that fail for a while, with a store that fails on demand."""

import itertools

import jax
import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoints, Saver, retry
from moe_jax.checkpoint.failures import SaveError
from moe_jax.config import CheckpointConfig
from moe_jax.errors import RunError


class Store:
    """Stands for `Checkpoints`: fails at the probe, at the beginning or in the end."""

    def __init__(self):
        self.broken = ""  # Or "probe", "begin", "end".
        self.saved, self.forgotten, self.writing = [2], 0, None
        self.doomed = False

    def steps(self):
        return self.saved

    def probe(self):
        return "no space" if self.broken == "probe" else ""

    def save(self, step, state, data, *, force):
        assert force and self.writing is None
        if self.broken == "begin":
            raise SaveError("cannot begin")
        self.writing, self.doomed = step, self.broken == "end"
        return True

    def is_saving(self):
        return False

    def wait(self):
        step, self.writing = self.writing, None
        if step is not None and self.doomed:
            raise SaveError("no end")
        if step is not None:
            self.saved.append(step)

    def forget(self):
        self.forgotten += 1


class Clock:
    def __init__(self, monkeypatch):
        self.now, self.slept = 1000.0, 0.0
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retry.time, "sleep", self.sleep)

    def sleep(self, secs):
        self.slept += secs
        self.now += secs


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def go(saver, steps, last=-1):
    """Asks at every step; those at which a save was tried."""
    tried = []
    for step in steps:
        if saver.due(step, step == last):
            tried.append(step)
            saver.save(step, None, {}, last=step == last)
    return tried


@pytest.mark.parametrize("kind", ["probe", "begin", "end"])
def test_goes_on_and_tries_again_after_a_pause(clock, capsys, kind):
    store = Store()
    saver = Saver(store, CheckpointConfig(every=4, retries=3, retry_secs=10))
    assert go(saver, range(1, 5)) == [4]
    store.broken = kind
    assert go(saver, range(5, 10)) == [8], "a pause of 10 s begins"
    assert store.saved == [2, 4]
    clock.now += 9
    assert go(saver, range(10, 14)) == [], "not at 12 either: the pause is not over"
    clock.now += 2
    assert go(saver, [14, 15]) == [14], "a pause of 20 s begins"
    store.broken = ""
    clock.now += 19
    assert go(saver, [17]) == []
    clock.now += 2
    assert go(saver, range(18, 25)) == [18, 20, 24], "as the config says again"
    store.wait()
    assert store.saved == [2, 4, 18, 20, 24]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("WARNING" in line for line in lines)
    assert "saving step 8 failed" in lines[0] and "is that of step 4" in lines[0]
    assert "in a row: 2" in lines[1] and "next try in 20 s" in lines[1]
    assert "step 18 is saved, after 2 failures" in lines[2]


def test_another_process_that_failed(clock, monkeypatch, capsys):
    """No save is begun while this process is in one that failed elsewhere."""
    store, other = Store(), np.array([False, True, False])
    store.is_saving = lambda: store.writing is not None
    saver = Saver(store, CheckpointConfig(every=4, retries=3, retry_secs=10))
    assert go(saver, range(1, 5)) == [4]
    # Of the other: still writing, failed, pausing.
    exchange = lambda *bits: np.array([bits, other[: len(bits)] * (len(bits) > 1)])
    monkeypatch.setattr(saver, "_exchange", exchange)
    assert go(saver, range(5, 9)) == [] and store.writing == 4
    store.wait()  # Orbax' limit has passed; this part is no checkpoint.
    store.saved.remove(4)
    assert go(saver, [9]) == [] and store.forgotten == 1
    err = capsys.readouterr().err
    assert "step 4 failed: in another process; the newest checkpoint is that of" in err
    other[:] = False
    clock.now += 11
    assert go(saver, [10]) == [10] and store.writing == 10

    other[1] = True
    store.is_saving = lambda: False
    with pytest.raises(RunError, match="step 12 failed: in another process"):
        go(saver, [12], last=12)  # For the last it waits.


def test_another_process_that_fails_while_this_one_waits(clock, monkeypatch, capsys):
    """Training goes on though this one is in the save still."""
    store = Store()
    store.is_saving = lambda: store.writing is not None
    saver = Saver(store, CheckpointConfig(every=4, retries=3, retry_secs=10))
    assert go(saver, range(1, 5)) == [4]

    def exchange(*bits):
        failed = len(bits) > 1 and clock.slept > 1
        return np.array([bits, (False, failed, False)[: len(bits)]])

    monkeypatch.setattr(saver, "_exchange", exchange)
    assert go(saver, range(5, 9)) == [] and store.writing == 4
    assert 1 < clock.slept < 2


def test_gives_up(clock):
    store = Store()
    store.broken = "end"
    saver = Saver(store, CheckpointConfig(every=1, retries=2, retry_secs=1))
    with pytest.raises(RunError, match=r"of step 2.*row: 3 .*retries=2\): the run"):
        for step in range(1, 100):
            clock.now += 0.9
            go(saver, [step])
    assert store.saved == [2]


def test_the_last_save_is_waited_for(clock):
    store = Store()
    store.broken = "probe"
    beats = []

    def beat():
        beats.append(clock.now)
        if clock.slept > 6:
            store.broken = ""

    saver = Saver(store, CheckpointConfig(every=100, retry_secs=1), beat)
    assert go(saver, [1, 2, 3], last=3) == [3]
    assert store.saved == [2, 3] and 7 <= clock.slept < 8  # 1 + 2 + 4
    assert max(b - a for a, b in itertools.pairwise(beats)) <= 1

    store.broken = "probe"
    saver = Saver(store, CheckpointConfig(every=100, retries=3, retry_secs=9))
    with pytest.raises(RunError, match=r"saving step 7 failed: no space; .*of step 3"):
        go(saver, [7], last=7)


def test_a_real_folder_that_goes_away_and_comes_back(tmp_path, capsys):
    """What was saved before is there again; nothing is written twice."""
    folder = tmp_path / "checkpoints"
    config = CheckpointConfig(every=2, retry_secs=0)
    store = Checkpoints(str(folder), config)
    saver = Saver(store, config)
    state = lambda step: {"x": jax.numpy.full((8,), step, jax.numpy.float32)}

    def steps(numbers):
        for step in numbers:
            if saver.due(step, last=step == 8):
                saver.save(step, state(step), {"step": step}, last=step == 8)

    steps([1, 2, 3])
    store.wait()
    folder.rename(tmp_path / "away")
    folder.write_text("a file where the folder was")
    steps([4, 5])
    folder.unlink()
    (tmp_path / "away").rename(folder)
    steps([6, 7, 8])
    assert store.steps() == [6, 8]
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )
    found = store.restore(like)
    assert found.step == 8 and found.data == {"step": 8} and not found.notes
    np.testing.assert_array_equal(found.state["x"], np.full(8, 8))
    store.close()
    err = capsys.readouterr().err
    assert "saving step 4 failed" in err and "is that of step 2" in err
