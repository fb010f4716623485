"""Lines, the bar on a terminal, and readers that go away."""

import io
import os
import pathlib
import subprocess
import sys

from moe_jax.observe import console

ROOT = pathlib.Path(__file__).parents[2]
FIGURES = {
    "loss": 2.34567,
    "bits_per_byte": 1.98765,
    "tokens_per_second": 38_240.0,
    "step_ms": 131.4,
    "mfu": 0.4123,
    "grad_norm": 0.5312,
    "load_max_over_mean": 1.316,
    "drops": 12,
    "router_entropy": 1.5,
}


def test_line():
    assert console.format_line(120, 2000, FIGURES) == (
        "step  120/2000  loss 2.3457  bpb 1.988  38.2k tok/s  131 ms  mfu 41.2%  "
        "grad 0.531  load 1.32x  drops 12  router_entropy 1.5"
    )


def test_line_leaves_out_what_is_not_known():
    line = console.format_line(1, 9, {"loss": float("nan"), "mfu": None})
    assert line == "step 1/9  loss nan"


def test_lines_every_few_steps_and_at_the_end(capsys):
    with console.Console(10, True, every=4) as out:
        for step in range(1, 11):
            out.step(step, {"loss": 1.0})
        out.note("done [bold]here[/bold]\x1b[2J")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["4/10", "8/10", "10/10"]
    assert lines[-1] == "done [bold]here[/bold]\\x1b[2J"


def test_disabled_is_silent(capsys):
    with console.Console(10, False) as out:
        out.step(10, {"loss": 1.0})
        out.note("x")
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", terminal)
    with console.Console(10, True, every=5, start_step=2) as out:
        out.note("text [red]as it is[/red] :smile:")
        out.step(5, {"loss": 1.0})
    written = terminal.getvalue()
    assert "text [red]as it is[/red] :smile:" in written
    assert "5/10" in written and "left" in written and "loss 1.0000" in written


def test_narrow_encoding_does_not_silence(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with console.Console(10, True) as out:
        out.note("caf\u00e9")
        out.note("next")
    stream.flush()
    assert stream.buffer.getvalue() == b"caf\\xe9\nnext\n"


def test_training_goes_on_when_the_reader_leaves():
    code = (
        "import sys, time\n"
        "from moe_jax.observe.console import Console\n"
        "with Console(200, True, every=1) as out:\n"
        "    for step in range(1, 201):\n"
        "        out.step(step, {'loss': 1.0}); time.sleep(0.002)\n"
        "print('more'); print('finished', file=sys.stderr)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child.stdout.readline()
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(timeout=60) == 0
    assert err == "finished\n"


def test_closed_and_missing_stdout(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        with console.Console(10, True, every=1) as out:
            out.step(1, {"loss": 1.0})
