"""Barriers of four processes, as threads with a key-value store of their own."""

import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from moe_jax.checkpoint import barriers
from moe_jax.checkpoint.barriers import Barriers, ElsewhereError

PROCESSES = 4
A_MINUTE = 60_000


class Client:
    """What the barriers use of JAX' client."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            if key in self.values:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_increment(self, key, by):
        with self.changed:
            self.values[key] = self.values.get(key, 0) + by
            return self.values[key]

    def key_value_try_get(self, key):
        return self.values[key]

    def blocking_key_value_get(self, key, timeout_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_ms / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]

    def key_value_delete(self, key):
        with self.changed:
            inside = [name for name in self.values if name.startswith(f"{key}/")]
            for name in inside:
                del self.values[name]


def connect(monkeypatch, client):
    state = types.SimpleNamespace(client=client)
    jax_has = types.SimpleNamespace(global_state=state)
    monkeypatch.setattr(barriers, "distributed", jax_has)


@pytest.fixture
def save(monkeypatch):
    """Runs `part(index, barrier)` in all; what each returns or raises."""
    here = threading.local()
    client = Client()
    connect(monkeypatch, client)
    monkeypatch.setattr(jax, "process_count", lambda: PROCESSES)
    monkeypatch.setattr(jax, "process_index", lambda: here.index)
    monkeypatch.setattr(barriers, "_begun", iter([0] * PROCESSES))

    def run(part):
        def process(index):
            here.index = index
            barrier = Barriers()
            try:
                return part(index, barrier), barrier.broken
            except Exception as error:
                return error, barrier.broken

        with ThreadPoolExecutor(PROCESSES) as pool:
            return list(pool.map(process, range(PROCESSES)))

    run.client = client
    return run


def orbax(barrier, write, commit):
    """The end of a save, as Orbax has it."""
    try:
        write()
        barrier(key="written", timeout_ms=A_MINUTE)
        commit()
        barrier(key="committed", timeout_ms=A_MINUTE)
    finally:
        barrier(key="over", timeout_ms=A_MINUTE)
    return "saved"


def nothing():
    pass


def full():
    raise OSError("full")


def test_all_meet_save_after_save(save):
    met, used = [[] for _ in range(6)], []

    def part(index, barrier):
        used.append(barrier)
        for number, before in enumerate(met):
            before.append(index)
            if index == number % PROCESSES:
                time.sleep(0.1)
                assert not any(b.broken for b in used), "those that wait are saving"
            barrier(key="any", timeout_ms=A_MINUTE)
            assert len(met[number]) == PROCESSES, "one is through before all came"

    assert save(part) == [(None, False)] * PROCESSES
    left = {name.split("/")[2] for name in save.client.values}
    assert left == {"6"}, "what was said at earlier barriers is still there"


@pytest.mark.parametrize("failing", [0, 1, 3])
@pytest.mark.parametrize("part", ["write", "commit"])
def test_one_that_fails(save, failing, part):
    """It gets its own error, the others another, and nobody waits for a minute."""

    def process(index, barrier):
        orbax(barrier, nothing, nothing)
        doing = {"write": nothing, "commit": nothing}
        if index == failing:
            doing[part] = full
        return orbax(barrier, **doing)

    for index, (error, broken) in enumerate(save(process)):
        assert type(error) is (OSError if index == failing else ElsewhereError)
        assert broken


def test_one_that_never_comes(save):
    """The others time out; when it comes after all it does not take it for good."""
    over = threading.Barrier(PROCESSES)

    def process(index, barrier):
        try:
            if index == 2:
                over.wait(60)
            barrier(key="written", timeout_ms=50 if index != 2 else A_MINUTE)
        finally:
            if index != 2:
                over.wait(60)

    ended = save(process)
    kinds = [type(error) for error, _ in ended]
    assert all(broken for _, broken in ended)
    assert kinds.pop(2) is ElsewhereError
    assert jax.errors.JaxRuntimeError in kinds
    assert set(kinds) <= {jax.errors.JaxRuntimeError, ElsewhereError}


def test_an_exception_that_the_caller_handles_is_none_of_the_save(monkeypatch):
    """The main thread may begin a save while it handles something else."""
    connect(monkeypatch, Client())
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    barrier = Barriers()
    try:
        raise KeyError("of the caller")
    except KeyError:
        barrier(key="begin", timeout_ms=A_MINUTE)
    assert not barrier.broken
