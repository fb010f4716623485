"""Starts one run as several processes on this machine. Needs Python alone.

Each process is what a host is on a cluster. Useful to try a run on many hosts
before renting them, and to keep a run on one machine alive:

  python launch/local.py -n 2 --devices-per-process=4 --restart=5 -- \
      moe-jax train --config=configs/quickstart.py --workdir=/tmp/run \
      --config.mesh.expert=4

Lines of output begin with the index of their process. When one process fails the
others are ended; the exit status is that of the first that failed, 124 after a
timeout. Ctrl-C, SIGTERM and SIGHUP (as SIGTERM) are passed on once; a second one
ends everything.

With --restart=N all processes are started anew after a failure, at most N times in
a row, after 1, 2, 4, ... 60 seconds; an attempt that lasted --healthy seconds begins
the count again. Not after a mistake of the user (status 2, 126, 127), a signal to
this launcher, or --timeout: these would fail again, or are meant.
"""

import argparse
import ctypes
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

_POLL_SECS = 0.05
_MISTAKES = (2, 126, 127)
_LONGEST_WAIT = 60.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Loaded here: what runs between fork and exec must not load anything.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-n", type=int, required=True, help="processes")
    add(
        "--devices-per-process",
        type=int,
        default=0,
        help="devices of each; 0 lets the mesh of the config decide (CPU)",
    )
    add(
        "--platform",
        default="cpu",
        help="value of JAX_PLATFORMS; with cuda, process i takes its share of the "
        "devices in order (default: cpu)",
    )
    add("--port", type=int, default=0, help="of process 0; 0 chooses a free one")
    add("--timeout", type=float, default=0, help="seconds for all; 0 is no limit")
    add("--grace", type=float, default=5, help="seconds between SIGTERM and SIGKILL")
    add("--restart", type=int, default=0, help="restarts in a row after failures")
    add("--backoff", type=float, default=1, help="seconds before the first restart")
    add(
        "--healthy",
        type=float,
        default=600,
        help="seconds after which an attempt counts as good (default: 600)",
    )
    add("--dry-run", action="store_true", help="print what would be started, and end")
    add("command", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    args = parser.parse_args(argv)
    args.command = args.command[args.command[:1] == ["--"] :]
    if not args.command:
        parser.error("no command: write it after --")
    if args.n < 1:
        parser.error("-n must be at least 1")
    for name in ("devices_per_process", "port", "timeout", "grace", "restart"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if args.backoff < 0 or args.healthy <= 0:
        parser.error("--backoff must not be negative, and --healthy positive")
    return args


def settings(args: argparse.Namespace, index: int, port: int) -> dict[str, str]:
    """What process `index` finds, as moe_jax.parallel.cluster reads it."""
    env = {
        "MOE_JAX_COORDINATOR": f"127.0.0.1:{port}",
        "MOE_JAX_NUM_PROCESSES": str(args.n),
        "MOE_JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": args.platform,
    }
    count = args.devices_per_process
    if count:
        env["MOE_JAX_LOCAL_DEVICES"] = str(count)
        if args.platform != "cpu":
            mine = range(index * count, (index + 1) * count)
            env["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, mine))
    # XLA:CPU sizes its thread pool from NPROC. With fewer threads than devices a
    # collective waits for ever for participants without a thread.
    asked = os.environ.get("NPROC", "")
    given = int(asked) if asked.isdigit() else 0
    env["NPROC"] = str(max(32, 2 * count, os.cpu_count() or 1, given))
    env["PYTHONUNBUFFERED"] = "1"
    return env


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent() -> None:
    """In a child, before its command: SIGKILL when the launcher dies. Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def status_of(returncode: int) -> int:
    """As a shell says it: 128 + the signal for a process that one has ended."""
    return 128 - returncode if returncode < 0 else returncode


class Group:
    """The processes of one attempt.

    Attributes:
      ended: index and status of those that have ended, in this order.
    """

    def __init__(self, args: argparse.Namespace):
        self.ended: queue.Queue[tuple[int, int]] = queue.Queue()
        self._lock = threading.Lock()
        self._readers: list[threading.Thread] = []
        self._children: list[subprocess.Popen] = []
        port = args.port or free_port()
        for index in range(args.n):
            child = subprocess.Popen(
                args.command,
                env=os.environ | settings(args, index, port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A Ctrl-C of the terminal would reach the children a second time.
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            self._children.append(child)
            self._readers.append(self._thread(self._copy, index, child.stdout))
            self._thread(self._wait, index, child)

    def _thread(self, body, *arguments) -> threading.Thread:
        thread = threading.Thread(target=body, args=arguments, daemon=True)
        thread.start()
        return thread

    def _wait(self, index: int, child: subprocess.Popen) -> None:
        self.ended.put((index, status_of(child.wait())))

    def _copy(self, index: int, stream) -> None:
        prefix = f"[{index}] ".encode()
        for line in stream:
            with self._lock:
                try:
                    sys.stdout.buffer.write(prefix + line.rstrip(b"\r\n") + b"\n")
                    sys.stdout.buffer.flush()
                except (BrokenPipeError, ValueError):
                    pass  # nobody reads; keep the children's pipes empty

    def send(self, number: int) -> None:
        """Signals every process that is still there, with its own children."""
        for child in self._children:
            if child.poll() is None:
                try:
                    os.killpg(child.pid, number)
                except ProcessLookupError:
                    pass

    def end(self, grace: float) -> None:
        """SIGTERM, then SIGKILL: JAX's preemption service swallows the first."""
        self.send(signal.SIGTERM)
        limit = time.monotonic() + grace
        while time.monotonic() < limit and self.running():
            time.sleep(_POLL_SECS)
        self.send(signal.SIGKILL)
        for child in self._children:
            child.wait()

    def running(self) -> bool:
        return any(child.poll() is None for child in self._children)

    def mistake(self) -> int:
        """The status of a process that ended for a mistake of the user, or 0."""
        found = [status_of(c.returncode) for c in self._children if c.poll()]
        return next((status for status in found if status in _MISTAKES), 0)

    def drain(self) -> None:
        for reader in self._readers:
            reader.join(timeout=2)


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


class Launcher:
    """Attempts at one run, and the signals that this process receives.

    Attributes:
      limit: when the time of --timeout is over, on the monotonic clock.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.signals: list[int] = []
        self.limit = time.monotonic() + (args.timeout or float("inf"))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        # The terminal is gone: save and stop, as for a SIGTERM.
        self.signals.append(signal.SIGTERM if number == signal.SIGHUP else number)

    def run(self) -> int:
        """All attempts; returns the exit status."""
        restarts = 0
        while True:
            begin = time.monotonic()
            try:
                group = Group(self.args)
            except OSError as error:
                say(f"cannot start {self.args.command[0]!r}: {error.strerror}")
                return 2
            try:
                status = self._watch(group)
            finally:
                if group.running():
                    group.end(self.args.grace)
                group.drain()
            if not status or not self.args.restart:
                return status
            if time.monotonic() - begin >= self.args.healthy:
                restarts = 0
            if reason := self._why_not(status, restarts):
                say(f"status {status}: no restart: {reason}")
                return status
            restarts += 1
            if not self._back_off(status, restarts):
                return 124 if not self.signals else 128 + self.signals[-1]

    def _why_not(self, status: int, restarts: int) -> str:
        """Why a failure is not worth another attempt, or ""."""
        if self.signals:
            return f"stopped by {signal.Signals(self.signals[0]).name}"
        if time.monotonic() > self.limit:
            return f"the time is over (--timeout={self.args.timeout:g})"
        if status in _MISTAKES:
            return "a mistake in the command or its config would come again"
        if restarts >= self.args.restart:
            return f"{restarts} in a row have failed (--restart={self.args.restart})"
        return ""

    def _back_off(self, status: int, restarts: int) -> bool:
        """Waits before a restart; False where a signal or the timeout came."""
        wait = min(self.args.backoff * 2 ** (restarts - 1), _LONGEST_WAIT)
        say(f"status {status}: restart {restarts} of {self.args.restart} in {wait:g} s")
        until = time.monotonic() + wait
        while time.monotonic() < until:
            if self.signals or time.monotonic() > self.limit:
                say("stopped while waiting for the restart")
                return False
            time.sleep(_POLL_SECS)
        return True

    def _watch(self, group: Group) -> int:
        """Waits for the end of one attempt; returns its exit status."""
        args, left, forwarded = self.args, self.args.n, False
        while left:
            try:
                index, status = group.ended.get(timeout=_POLL_SECS)
            except queue.Empty:
                pass
            else:
                left -= 1
                if status:
                    return self._failed(group, index, status)
            if time.monotonic() > self.limit:
                say(
                    f"not done after --timeout={args.timeout:g} s: ending all processes"
                )
                group.end(args.grace)
                return 124
            if len(self.signals) > 1:
                say("second signal: ending all processes")
                group.end(args.grace)
                return 128 + self.signals[-1]
            if self.signals and not forwarded:
                forwarded = True
                group.send(self.signals[0])
        return 0

    def _failed(self, group: Group, index: int, status: int) -> int:
        if group.running():
            say(f"process {index} ended with status {status}: ending the others")
            group.end(self.args.grace)
        # The others fail because one is gone; what it says is what happened.
        return group.mistake() or status


def show(args: argparse.Namespace) -> None:
    """Prints one line of shell for each process."""
    port = args.port or free_port()
    for index in range(args.n):
        env = (f"{k}={shlex.quote(v)}" for k, v in settings(args, index, port).items())
        print(f"[{index}] {' '.join(env)} {shlex.join(args.command)}")
    if args.restart:
        print(
            f"after a failure: at most {args.restart} restarts in a row, the first "
            f"after {args.backoff:g} s; after {args.healthy:g} s the count begins again"
        )


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.dry_run:
        show(args)
        return 0
    return Launcher(args).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
