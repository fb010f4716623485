"""`moe-jax NAME ...`: finds the command and runs it.

`python -m moe_jax.cli.NAME ...` does the same; of a command of two words the second
stands behind a dot.
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
    "sample": "draw images from a checkpoint",
    "ledger": "show that a run was trained on each row once in every pass",
    "convert from-hf": "make a workdir of a Hugging Face checkpoint",
    "convert to-hf": "write a workdir's model for Hugging Face transformers",
    "convert from-dit": "make a workdir of a checkpoint of DiT or DiT-MoE",
    "convert to-dit": "write a workdir's model under the names of DiT-MoE",
    "convert pt-to-safetensors": "write tensors of a torch file as safetensors",
    "plan": "say what a step needs and costs on devices that are not there",
    "check": "show that this config gives the same numbers on every mesh",
    "bench step": "train some steps and say where their time goes",
    "bench layer": "compare an MoE layer's speed with that of a dense matmul",
    "bench data": "measure how fast the input pipeline gives batches",
    "bench compile": "measure how long a step takes to compile, and its memory",
    "bench skew": "compare the dispatches under routings from even to one expert",
}


def module_of(name: str) -> str:
    """The module of a command."""
    return f"moe_jax.cli.{name.replace(' ', '.').replace('-', '_')}"


def usage(group: str = "") -> str:
    """The help text; with a group, of the commands of two words that begin so."""
    shown = [name for name in COMMANDS if not group or name.split()[0] == group]
    width = max(map(len, shown))
    lines = [f"  {name:<{width}}  {COMMANDS[name]}" for name in shown]
    return "\n".join(
        [
            f"usage: moe-jax {f'{group} NAME' if group else 'COMMAND'} "
            "[--flag=value ...]",
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
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    group = argv[0] if argv and argv[0] in groups else ""
    rest = argv[1:] if group else argv
    if not rest:
        print(usage(group), file=sys.stderr)
        return 2
    name, rest = rest[0], rest[1:]
    if name in ("-h", "--help", "help"):
        print(usage(group))
        return 0
    if name == "--version" and not group:
        print(f"moe_jax {moe_jax.__version__}")
        return 0
    name = f"{group} {name}".strip()
    if name not in COMMANDS:
        print(
            f"moe-jax: error: {name!r} is not a command{nearest(name, COMMANDS)} "
            f"(commands: {', '.join(COMMANDS)})",
            file=sys.stderr,
        )
        return 2
    command = importlib.import_module(module_of(name))
    from moe_jax.cli import common

    return common.execute(command.main, command.define_flags, rest, name)


if __name__ == "__main__":
    sys.exit(main())
