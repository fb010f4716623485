"""Starts one run as several processes on this machine.

Each process is what a host is on a cluster. Useful to try a run on many hosts
before renting them:

  python launch/local.py -n 2 --devices-per-process=4 -- \
      moe-jax train --config=configs/quickstart.py --workdir=/tmp/run \
      --config.mesh.expert=4

Lines of output begin with the index of their process. When one process fails the
others are ended; the exit status is that of the first that failed, 124 after a
timeout. Ctrl-C and SIGTERM are passed on once; a second one ends everything.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

_POLL_SECS = 0.05


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, required=True, help="processes")
    parser.add_argument(
        "--devices-per-process",
        type=int,
        default=0,
        help="devices of each; 0 lets the mesh of the config decide (CPU)",
    )
    parser.add_argument(
        "--platform",
        default="cpu",
        help="value of JAX_PLATFORMS; with cuda, process i takes its share of the "
        "devices in order (default: cpu)",
    )
    parser.add_argument(
        "--timeout", type=float, default=0, help="seconds for all; 0 is no limit"
    )
    parser.add_argument(
        "--grace", type=float, default=5, help="seconds between SIGTERM and SIGKILL"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    args = parser.parse_args(argv)
    args.command = args.command[args.command[:1] == ["--"] :]
    if not args.command:
        parser.error("no command: write it after --")
    if args.n < 1 or args.devices_per_process < 0:
        parser.error("-n must be at least 1 and --devices-per-process not negative")
    return args


def environment(args: argparse.Namespace, index: int, port: int) -> dict[str, str]:
    """The environment of process `index`, as moe_jax.parallel.distributed reads it."""
    env = dict(os.environ)
    env["MOE_JAX_COORDINATOR"] = f"127.0.0.1:{port}"
    env["MOE_JAX_NUM_PROCESSES"] = str(args.n)
    env["MOE_JAX_PROCESS_ID"] = str(index)
    env["JAX_PLATFORMS"] = args.platform
    count = args.devices_per_process
    if count:
        env["MOE_JAX_LOCAL_DEVICES"] = str(count)
        if args.platform != "cpu":
            mine = range(index * count, (index + 1) * count)
            env["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, mine))
    # XLA:CPU sizes its thread pool from NPROC. With fewer threads than devices a
    # collective waits for ever for participants without a thread.
    asked = env.get("NPROC", "")
    given = int(asked) if asked.isdigit() else 0
    env["NPROC"] = str(max(32, 2 * count, os.cpu_count() or 1, given))
    env["PYTHONUNBUFFERED"] = "1"
    return env


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Group:
    """The processes of one run."""

    def __init__(self, args: argparse.Namespace):
        self._lock = threading.Lock()
        self._readers = []
        self.children: list[subprocess.Popen] = []
        port = free_port()
        for index in range(args.n):
            child = subprocess.Popen(
                args.command,
                env=environment(args, index, port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A Ctrl-C of the terminal would reach the children a second time.
                start_new_session=True,
            )
            self.children.append(child)
            reader = threading.Thread(
                target=self._copy, args=(index, child.stdout), daemon=True
            )
            reader.start()
            self._readers.append(reader)

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
        for child in self.children:
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
        for child in self.children:
            child.wait()

    def running(self) -> bool:
        return any(child.poll() is None for child in self.children)

    def first_bad(self) -> tuple[int, int] | None:
        """Index and status of a process that failed."""
        for index, child in enumerate(self.children):
            if child.poll():
                code = child.returncode
                return index, 128 - code if code < 0 else code
        return None

    def drain(self) -> None:
        for reader in self._readers:
            reader.join(timeout=2)


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def watch(group: Group, args: argparse.Namespace, signals: list[int]) -> int:
    """Waits for the end of the run; returns the exit status."""
    limit = time.monotonic() + (args.timeout or float("inf"))
    forwarded = 0
    while group.running() or group.first_bad():
        if bad := group.first_bad():
            if group.running():
                say(f"process {bad[0]} ended with status {bad[1]}: ending the others")
                group.end(args.grace)
            return bad[1]
        if time.monotonic() > limit:
            say(f"not done after --timeout={args.timeout:g} s: ending all processes")
            group.end(args.grace)
            return 124
        if len(signals) > forwarded:
            if forwarded:
                say("second signal: ending all processes")
                group.end(args.grace)
                return 128 + signals[-1]
            forwarded = len(signals)
            group.send(signals[0])
        time.sleep(_POLL_SECS)
    return 0


def main(argv: list[str]) -> int:
    args = parse(argv)
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda caught, frame: signals.append(caught))
    try:
        group = Group(args)
    except OSError as error:
        say(f"cannot start {args.command[0]!r}: {error.strerror}")
        return 2
    try:
        return watch(group, args, signals)
    finally:
        if group.running():
            group.end(args.grace)
        group.drain()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
