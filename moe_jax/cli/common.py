"""What every command shares: flags, the config file, errors and exit statuses.

A command is a module with a docstring (its help text, with an example), a function
`define_flags()` and a function `main()`, and ends with

    if __name__ == "__main__":
        common.run(main, define_flags)

It imports JAX inside `main` only, so that a mistake in its flags shows at once.

Exit statuses: what `main` returns (None is 0; 1 is a failed check), 2 for a mistake
of the user, 1 with a stack trace for anything else, 130 after Ctrl-C.
"""

import dataclasses
import json
import os
import pathlib
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

import moe_jax
from moe_jax import config as config_lib
from moe_jax.cli import config_file
from moe_jax.config import Config, Node
from moe_jax.errors import RunError, UserError, nearest

FLAGS = flags.FLAGS
Main = Callable[[], int | None]


class _ConfigParser(flags.ArgumentParser):
    """Reads the config file and checks the names of all overrides beforehand."""

    def parse(self, argument: str) -> Config:
        config = config_file.load(argument)
        argv = FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
        config_file.check_overrides(config, argv)
        return config

    def flag_type(self) -> str:
        return "config file"


def define_config(default: str = "") -> None:
    """Defines `--config=FILE[:arg]` and its overrides `--config.a.b=value`.

    Args:
      default: what is taken where no file is named, from the folder of the checkout.
    """
    help_text = "The experiment: FILE or FILE:VARIANT."
    if default:
        help_text += f" Default: {default}."
        path = pathlib.Path(moe_jax.__file__).parents[1] / default
        named = any(arg.lstrip("-").split("=")[0] == "config" for arg in sys.argv[1:])
        if not named and path.exists():
            sys.argv.insert(1, f"--config={path}")
    config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)
    FLAGS["config"].parser = _ConfigParser()


def define_hosts() -> None:
    """Defines the flags that start one run on many hosts by hand."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", 0, "Processes of the run.")
    flags.DEFINE_integer("process_id", -1, "Which of them this one is, from 0.")


def define_workdir() -> None:
    """Defines `--workdir`, `--step` and `--mesh` of commands that load a run."""
    flags.DEFINE_string("workdir", "", "Folder of the run.")
    flags.DEFINE_integer("step", 0, "Which checkpoint; 0: the newest good one.", 0)
    flags.DEFINE_string(
        "mesh", "", "Mesh to use, as expert=2,tensor=2; default: that of the run."
    )


def define_json() -> None:
    """Defines `--json`, for `check_json` and `write_json`."""
    flags.DEFINE_string("json", "", "File for the figures.")


def check_json() -> None:
    """Before minutes of work: can the file of `--json` be written?

    Raises:
      UserError: it cannot.
    """
    folder = os.path.dirname(os.path.abspath(FLAGS.json))
    if FLAGS.json and (os.path.isdir(FLAGS.json) or not os.access(folder, os.W_OK)):
        raise UserError(
            f"--json={FLAGS.json} cannot be written: name a file in a folder that "
            "exists and may be written to"
        )


def write_json(figures: Any) -> None:
    """Writes figures to the file of `--json`, if one is named."""
    if not FLAGS.json:
        return
    from moe_jax.observe.writers import jsonable, write_atomically

    try:
        write_atomically(FLAGS.json, json.dumps(jsonable(figures), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json={FLAGS.json} cannot be written: {error}") from None


def read_workdir_config() -> Config:
    """The config of the run in `--workdir`, with the mesh of `--mesh`.

    Raises:
      UserError: no run there, or the mesh does not suit its model.
    """
    from moe_jax.train import workdir

    if not FLAGS.workdir:
        raise UserError("--workdir is missing: the folder of a run of moe-jax train")
    config = workdir.read_config(FLAGS.workdir)
    if FLAGS.mesh:
        config.mesh = parse_mesh(FLAGS.mesh)
    return _validated(config)


def parse_mesh(text: str) -> config_lib.MeshConfig:
    """A mesh from `expert=4,data=2`; axes that are not named have size 1.

    Raises:
      UserError: an axis that does not exist, or a size that is no positive number.
    """
    names = [f.name for f in dataclasses.fields(config_lib.MeshConfig)]
    sizes = dict.fromkeys(names, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in names:
            raise UserError(
                f"--mesh={text}: no axis {name!r}{nearest(name, names)} "
                f"(axes: {', '.join(names)})"
            )
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh={text}: {name}={size!r} is not a size, 1 or more")
        sizes[name] = int(size)
    return config_lib.MeshConfig(**sizes)


def start_hosts(config: Config) -> None:
    """Starts JAX on the hosts that `define_hosts` or the environment name."""
    from moe_jax.parallel import distributed

    distributed.start(
        config.mesh,
        coordinator=FLAGS.coordinator,
        num_processes=FLAGS.num_processes,
        process_id=FLAGS.process_id,
    )


def note(line: str) -> None:
    """Tells the user on standard error; of several processes the first does."""
    from moe_jax.parallel import distributed

    if distributed.is_primary():
        print(line, file=sys.stderr, flush=True)


def _allowed_types(annotation: Any) -> tuple[type, ...]:
    """The types a field takes, the one to name in a message last; (): any."""
    origin = typing.get_origin(annotation) or annotation
    if origin in (tuple, bool, int, str):
        return (origin,)
    if origin is float:
        return (int, float)
    kinds = typing.get_args(annotation) or (annotation,)
    if any(isinstance(kind, type) and issubclass(kind, Node) for kind in kinds):
        return tuple(reversed(kinds))  # `X | None`
    return ()


def _type_problems(value: Node, path: str) -> Iterator[str]:
    # Values from a config file have no type yet; a rule that compares a string
    # with a number would end in a stack trace.
    if not dataclasses.is_dataclass(value):
        yield f"{path}={type(value).__name__}(): a base class; choose one below it"
        return
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        allowed = _allowed_types(field.type)
        wrong_bool = isinstance(item, bool) and bool not in allowed
        if allowed and (wrong_bool or not isinstance(item, allowed)):
            yield (
                f"{path}.{field.name}={item!r}: must be of type "
                f"{allowed[-1].__name__}, not {type(item).__name__}"
            )
    for child_path, child in config_lib.children(value, path):
        yield from _type_problems(child, child_path)


def load_config(workdir: str = "") -> Config:
    """The config of `--config` with all overrides, validated.

    Args:
      workdir: of a run; its config is taken where none is named, if there is one.

    Raises:
      UserError: the flag is missing, or the config breaks a rule.
    """
    config = FLAGS.config
    if config is None and os.path.exists(os.path.join(workdir, "config.json")):
        from moe_jax.train import workdir as workdir_lib

        config = workdir_lib.read_config(workdir)
    if config is None:
        raise UserError(
            "--config is missing: name a config file, for example "
            "--config=configs/quickstart.py"
        )
    return _validated(config)


def _validated(config: Config) -> Config:
    problems = list(_type_problems(config, "config"))
    if problems:
        raise UserError("\n  --".join(["wrong types in the config:", *problems]))
    return config_lib.validate(config)


def run(
    main: Main,
    define_flags: Callable[[], None],
    argv: list[str] | None = None,
    name: str = "",
) -> NoReturn:
    """Runs a command as `execute` does and exits with its status."""
    sys.exit(execute(main, define_flags, argv, name))


def execute(
    main: Main,
    define_flags: Callable[[], None],
    argv: list[str] | None = None,
    name: str = "",
) -> int:
    """Parses the flags and runs a command.

    Args:
      main: the command.
      define_flags: defines its absl flags.
      argv: arguments without the program's name; default: the process's.
      name: the command's name; default: that of the module of `main`.

    Returns:
      The exit status. In a run of several processes an exception ends the process
      here, because a normal exit would wait for the others.
    """
    module = sys.modules[main.__module__]
    name = name or _module_name(module)
    old_argv, defined = sys.argv, set(FLAGS)
    # config_flags looks for overrides in sys.argv, so there they must stand.
    sys.argv = [f"moe-jax {name}", *(sys.argv[1:] if argv is None else argv)]
    try:
        define_flags()
        defined = set(FLAGS) - defined
        if _asks_for_help(sys.argv[1:]):
            print(help_text(name, module.__doc__ or "", defined))
            return 0
        return _guarded(lambda: _parse_then(main, defined), name)
    finally:
        sys.argv = old_argv
        # A second command in the same process may define the same names.
        for flag in [f for f in FLAGS if f in defined or f.startswith("config.")]:
            delattr(FLAGS, flag)


def _module_name(module: Any) -> str:
    spec = getattr(module, "__spec__", None)
    if spec is not None:
        return spec.name.rpartition(".")[2]
    return os.path.splitext(os.path.basename(module.__file__))[0]


def _parse_then(main: Main, own_flags: set[str]) -> int | None:
    try:
        rest = FLAGS(sys.argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error.flagname, own_flags)) from None
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(str(error).removeprefix("flag ")) from None
    if len(rest) > 1:
        raise UserError(
            f"unexpected argument {rest[1]!r}: options are written --name=value"
        )
    if "coordinator" not in own_flags:
        _refuse_hosts()
    status = main()
    if distributed := _hosts():
        distributed.finish()
    return status


def _refuse_hosts() -> None:
    """Of a command without `define_hosts`: each process would do all of it."""
    from moe_jax.parallel import cluster

    found = cluster.find()
    if found and found.num_processes > 1:
        raise UserError(
            f"this command is for one process, and {found.num_processes} were started "
            f"(found by {found.found_by}): give it without the launcher"
        )


def _hosts() -> Any:
    """The module that connected this process with others, or None."""
    module = sys.modules.get("moe_jax.parallel.distributed")
    return module if module is not None and module.is_started() else None


def _unknown_flag(flag: str, own_flags: set[str]) -> str:
    if flag.startswith(("config.", "noconfig.")) and "config" in own_flags:
        return f"--{flag} needs --config=FILE before it"
    shown = ", ".join(f"--{n}" for n in sorted(own_flags))
    hint = nearest(flag, own_flags).replace("'", "").replace("mean ", "mean --")
    return f"--{flag}: no such flag{hint} (flags: {shown})"


def _guarded(body: Callable[[], int | None], name: str) -> int:
    try:
        return body() or 0
    except UserError as error:
        print(f"moe-jax {name}: error: {error}", file=sys.stderr, flush=True)
        status = 2
    except RunError as error:
        print(f"moe-jax {name}: {error}", file=sys.stderr, flush=True)
        status = 1
    except KeyboardInterrupt:
        print(f"moe-jax {name}: interrupted", file=sys.stderr, flush=True)
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    if distributed := _hosts():
        distributed.exit_now(status)
    return status


def _asks_for_help(argv: list[str]) -> bool:
    return any(a in ("-h", "--h", "-help", "--help", "--helpfull") for a in argv)


def help_text(name: str, doc: str, names: set[str]) -> str:
    """The docstring of a command and one line for each of its flags."""
    lines = [f"moe-jax {name}: {doc.strip()}", "", "Flags:"]
    for flag_name in sorted(names):
        flag = FLAGS[flag_name]
        shown = f"--[no]{flag_name}" if flag.boolean else f"--{flag_name}=..."
        default = f" (default: {flag.default})" if flag.default else ""
        lines.append(f"  {shown:<24} {' '.join(flag.help.split())}{default}")
    if "config" in names:
        lines.append(f"  {'--config.KEY=VALUE':<24} Override any value of the config.")
    return "\n".join(lines)
