"""`moe-jax NAME ...`: finds the command and runs it.

`python -m moe_jax.cli.NAME ...` does the same.
"""

import importlib
import sys

import moe_jax
from moe_jax.errors import nearest

# One line each: the help text must not import the commands.
COMMANDS = {
    "train": "train, or go on where the workdir stopped",
    "eval": "score a checkpoint on held-out data",
    "generate": "write text from a checkpoint",
    "plan": "say what a step needs and costs on devices that are not there",
    "check": "show that this config gives the same numbers on every mesh",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(
        [
            "usage: moe-jax COMMAND [--flag=value ...]",
            "",
            "Trains Mixture-of-Experts models in JAX.",
            "",
            "commands:",
            *lines,
            "",
            "moe-jax COMMAND --help shows its flags and an example;",
            "moe-jax --version shows the version.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command that argv names; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(usage(), file=sys.stderr)
        return 2
    name, rest = argv[0], argv[1:]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"moe_jax {moe_jax.__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"moe-jax: error: {name!r} is not a command{nearest(name, COMMANDS)} "
            f"(commands: {', '.join(COMMANDS)})",
            file=sys.stderr,
        )
        return 2
    command = importlib.import_module(f"moe_jax.cli.{name}")
    from moe_jax.cli import common

    return common.execute(command.main, command.define_flags, rest, name)


if __name__ == "__main__":
    sys.exit(main())
