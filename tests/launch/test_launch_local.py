"""launch/local.py with children that do next to nothing."""

import importlib.util
import os
import re
import signal
import sys
import time

import pytest


@pytest.fixture
def local(launchers):
    """Runs `python -c CODE` in two processes."""

    def run(code, *options, n=2, **extra):
        command = ("--", sys.executable, "-c", code)
        return launchers.run(*launchers.local, "-n", n, *options, *command, **extra)

    return run


@pytest.fixture
def module(launchers):
    """The launcher, imported."""
    spec = importlib.util.spec_from_file_location("local", launchers.local[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INDEX = "import os, sys, time, signal; i = int(os.environ['MOE_JAX_PROCESS_ID'])\n"


def test_dry_run(launchers, module, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("NPROC", raising=False)
    options = ["-n", "2", "--devices-per-process=4", "--port=29400", "--restart=3"]
    command = ["moe-jax", "train", "--config=my config.py", "--workdir=runs/two"]
    assert module.main([*options, "--dry-run", "--", *command]) == 0
    launchers.golden("local", capsys.readouterr().out)


def test_a_share_of_the_gpus_for_each(module):
    args = module.parse(
        ["-n", "2", "--devices-per-process=2", "--platform=cuda", "--", "true"]
    )
    shares = [module.settings(args, i, 1)["JAX_LOCAL_DEVICE_IDS"] for i in range(2)]
    assert shares == ["0,1", "2,3"]


def test_environment(local):
    code = (
        "import os; e = os.environ; print(e['MOE_JAX_PROCESS_ID'],"
        "e['MOE_JAX_NUM_PROCESSES'], e['MOE_JAX_LOCAL_DEVICES'], e['NPROC'])"
    )
    result = local(code, "--devices-per-process=20")
    assert result.returncode == 0
    threads = max(40, os.cpu_count() or 1)
    assert sorted(result.stdout.splitlines()) == [
        f"[0] 0 2 20 {threads}",
        f"[1] 1 2 20 {threads}",
    ]


def test_all_get_the_same_free_port(local):
    result = local("import os; print(os.environ['MOE_JAX_COORDINATOR'])", n=3)
    ports = re.findall(r"\[\d\] 127\.0\.0\.1:(\d+)", result.stdout)
    assert len(ports) == 3 and len(set(ports)) == 1 and int(ports[0]) > 1023


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("-n", "2"), "no command"),
        (("-n", "0", "--", "true"), "-n must be at least 1"),
        (("-n", "1", "--restart=-1", "--", "true"), "--restart must not be negative"),
        (("-n", "1", "--healthy=0", "--", "true"), "--healthy positive"),
        (("-n", "2", "--", "no-such-command-here"), "cannot start"),
    ],
)
def test_bad_input(launchers, arguments, message):
    result = launchers.run(*launchers.local, *arguments)
    assert result.returncode == 2 and message in result.stderr


def test_help_has_an_example(launchers):
    assert "moe-jax train" in launchers.run(*launchers.local, "--help").stdout


def test_status_of_the_first_that_fails(local):
    # Process 0 fails because 1 has died, and later: its status is not the cause.
    code = INDEX + "time.sleep(0.3 * (1 - i)); sys.exit([5, 7][i])"
    result = local(code, "--grace=2")
    assert result.returncode == 7
    assert "process 1 ended with status 7: ending the others" in result.stderr


def test_one_killed_child_ends_the_others(local):
    code = INDEX + (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if i == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(50)"
    )
    begin = time.monotonic()
    result = local(code, "--grace=0.5", n=3)
    assert result.returncode == 137, "128 + SIGKILL"
    assert time.monotonic() - begin < 20


def test_a_mistake_of_one_is_what_is_reported(local, tmp_path):
    # Process 0 fails first, for it has lost process 1, which then says why.
    up = tmp_path / "up"
    code = INDEX + (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"if i: open({str(up)!r}, 'w').close(); time.sleep(0.5); sys.exit(2)\n"
        f"while not os.path.exists({str(up)!r}): time.sleep(0.01)\n"
        "sys.exit(134)"
    )
    result = local(code, "--grace=5")
    assert "process 0 ended with status 134" in result.stderr
    assert result.returncode == 2


def test_timeout_kills_what_ignores_sigterm(local):
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('up', flush=True); time.sleep(50)"
    )
    begin = time.monotonic()
    result = local(code, "--timeout=1.5", "--grace=0.5", "--restart=5")
    assert result.returncode == 124
    assert "not done after --timeout=1.5 s" in result.stderr
    assert "no restart: the time is over (--timeout=1.5)" in result.stderr
    assert time.monotonic() - begin < 20


CATCH = INDEX + (
    "def stop(number, frame): print('got', number, flush=True); sys.exit({status})\n"
    "for s in (2, 15): signal.signal(s, stop)\n"
    "print('up', flush=True); time.sleep(50)"
)


def wait_until_up(child, count=2):
    seen = 0
    for line in child.stdout:
        seen += "up" in line
        if seen == count:
            return


@pytest.mark.parametrize(
    "sent, received", [("SIGINT", 2), ("SIGTERM", 15), ("SIGHUP", 15)]
)
def test_signals_are_passed_on(launchers, sent, received):
    code = CATCH.format(status=0)
    child = launchers.start(
        *launchers.local, "-n", 2, "--restart=3", "--", sys.executable, "-c", code
    )
    wait_until_up(child)
    child.send_signal(signal.Signals[sent])
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0, "a checkpoint was saved: nothing has failed"
    assert sorted(out.split("\n")[:2]) == [f"[0] got {received}", f"[1] got {received}"]
    assert "restart" not in err


def test_no_restart_after_a_signal(launchers):
    code = CATCH.format(status=1)
    child = launchers.start(
        *launchers.local, "-n", 2, "--restart=3", "--", sys.executable, "-c", code
    )
    wait_until_up(child)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 1
    assert "status 1: no restart: stopped by SIGTERM" in err


def test_restarts_until_it_is_good(local, tmp_path):
    # The third attempt is good; the waits before it are 0.2 and 0.4 s.
    count = tmp_path / "count"
    code = INDEX + (
        f"open({str(count)!r}, 'a').write(str(time.time()) + '\\n')\n"
        f"sys.exit(0 if len(open({str(count)!r}).readlines()) == 3 else 1)"
    )
    result = local(code, "--restart=5", "--backoff=0.2", n=1)
    assert result.returncode == 0, result.stderr
    first, second, third = map(float, count.read_text().split())
    assert second - first >= 0.2 and third - second >= 0.4
    assert [line for line in result.stderr.splitlines() if "restart" in line] == [
        "launch: status 1: restart 1 of 5 in 0.2 s",
        "launch: status 1: restart 2 of 5 in 0.4 s",
    ]


def test_gives_up_after_some_restarts(local):
    code = INDEX + "print('try', flush=True); sys.exit(9 if i else 0)"
    result = local(code, "--restart=2", "--backoff=0")
    assert result.returncode == 9
    assert result.stdout.count("[1] try") == 3
    assert "no restart: 2 in a row have failed (--restart=2)" in result.stderr


def test_a_good_while_begins_the_count_again(local, tmp_path):
    # Four attempts of 0.4 s, longer than --healthy, with --restart=1.
    count = tmp_path / "count"
    code = INDEX + (
        f"open({str(count)!r}, 'a').write('x'); time.sleep(0.4)\n"
        f"sys.exit(0 if len(open({str(count)!r}).read()) == 4 else 1)"
    )
    result = local(code, "--restart=1", "--backoff=0", "--healthy=0.3", n=1)
    assert result.returncode == 0, result.stderr
    assert count.read_text() == "xxxx"


@pytest.mark.parametrize("status", [2, 126, 127])
def test_no_restart_after_a_mistake(local, status):
    result = local(f"import sys; sys.exit({status})", "--restart=5")
    assert result.returncode == status
    assert "no restart: a mistake in the command or its config" in result.stderr


def test_a_signal_ends_the_wait_for_a_restart(launchers):
    command = ("--", sys.executable, "-c", "import sys; sys.exit(1)")
    options = ("-n", 1, "--restart=3", "--backoff=50")
    child = launchers.start(*launchers.local, *options, *command)
    assert "restart 1 of 3 in 50 s" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "stopped while waiting for the restart" in err


@pytest.mark.skipif(sys.platform != "linux", reason="by prctl of Linux")
def test_a_killed_launcher_takes_its_processes_along(launchers, tmp_path):
    code = INDEX + f"open(r'{tmp_path}/' + str(os.getpid()), 'w'); time.sleep(100)"
    child = launchers.start(*launchers.local, "-n", 2, "--", sys.executable, "-c", code)
    limit = time.monotonic() + 60
    while len(os.listdir(tmp_path)) < 2:
        assert time.monotonic() < limit
        time.sleep(0.05)
    child.kill()
    child.communicate()
    limit = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in os.listdir(tmp_path)):
        assert time.monotonic() < limit, "they live on"
        time.sleep(0.05)
