"""Loads a config file and checks the names of overrides.

Every mistake in either becomes one `UserError` that names the file and the line, or
the nearest key. `config_flags` alone shows a stack trace for most of them.
"""

import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ml_collections.config_flags import config_path

from moe_jax import config_json
from moe_jax.config import Config, Node
from moe_jax.errors import UserError, nearest


def load(argument: str) -> Config:
    """The config that `FILE` or `FILE:VARIANT` returns, or that a run saved as JSON.

    The file's folder is importable by its name, so that `from configs import
    quickstart` finds the sibling from any working directory.

    Raises:
      UserError: no such file, an error inside it, or it returns no config.
    """
    path, colon, variant = argument.partition(":")
    shown = f"--config={argument}"
    if not path:
        raise UserError("--config is empty: name a config file")
    if not os.path.isfile(path):
        raise UserError(f"{shown}: no such file{_nearest_file(path)}")
    if path.endswith(".json"):
        return _of_run(path, shown)
    path = os.path.abspath(path)
    with _importable(os.path.dirname(path)):
        try:
            module = _execute(path)
        except UserError:
            raise
        except Exception as error:
            raise UserError(_located(error, path)) from None
        get_config = _get_config(module, shown, [variant] if colon else [])
        try:
            config = get_config(*([variant] if colon else []))
        except UserError:
            raise
        except Exception as error:
            raise UserError(_located(error, path)) from None
    if not isinstance(config, Config):
        raise UserError(
            f"{shown}: get_config() returned {type(config).__name__}; it must return "
            "a moe_jax.config.Config"
        )
    return config


def _of_run(path: str, shown: str) -> Config:
    """A config that a run has saved."""
    try:
        with open(path, encoding="utf-8") as file:
            return config_json.from_json(file.read())
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"{shown} cannot be read: {error}") from None


def _nearest_file(path: str) -> str:
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f" (there is no folder {folder!r})"
    names = [n for n in os.listdir(folder) if n.endswith(".py")]
    return nearest(os.path.basename(path), names)


class _Siblings(importlib.abc.MetaPathFinder):
    """Answers for one package: the folder of the config file."""

    def __init__(self, folder: str):
        self._folder = folder

    def find_spec(self, name, path=None, target=None):
        parent, own_name = os.path.split(self._folder)
        if path is not None or name != own_name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, [parent])
        if spec is not None and spec.loader is None:
            # Without this, namespace folders of that name elsewhere join in.
            spec.submodule_search_locations = [self._folder]
        return spec


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    # First, so that a `configs` folder elsewhere on the path does not answer for
    # this one. The folder above goes last: at the front, a file in it could hide a
    # module of the standard library.
    above = os.path.dirname(folder)
    if above not in sys.path:
        sys.path.append(above)
    finder = _Siblings(folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _execute(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("moe_jax_experiment", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: a config file ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _get_config(module: ModuleType, shown: str, arguments: list[str]) -> Any:
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise UserError(
            f"{shown}: the file has no function get_config(); it must have one that "
            "returns a moe_jax.config.Config"
        )
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"{shown}: get_config{inspect.signature(function)}: {error}; its argument "
            "is the text after the colon in --config=FILE:VARIANT"
        ) from None
    return function


def _located(error: Exception, path: str) -> str:
    """`FILE:LINE: error`, the innermost line that stands in a config file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    folder = os.path.dirname(path)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if os.path.dirname(os.path.abspath(f.filename)) == folder]
    place = f"{own[-1].filename}:{own[-1].lineno}" if own else path
    return f"{place}: {type(error).__name__}: {error}{_nearest_field(str(error))}"


def _nearest_field(message: str) -> str:
    """A suggestion for Python's own messages about a wrong field of a config."""
    match = re.search(r"'(\w+)' object has no attribute '(\w+)'", message) or re.search(
        r"(\w+)\.__init__\(\) got an unexpected keyword .*'(\w+)'", message
    )
    if not match or "Did you mean" in message:
        return ""
    names: set[str] = set()
    for cls in _node_classes(Node):
        if cls.__name__ == match[1] and dataclasses.is_dataclass(cls):
            names.update(f.name for f in dataclasses.fields(cls))
    return nearest(match[2], names)


def _node_classes(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _node_classes(sub)


def check_overrides(config: Config, argv: list[str]) -> None:
    """Checks that every `--config.a.b` in argv names a value that a flag can set.

    Raises:
      UserError: it does not; the nearest key of that level is offered.
    """
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match:
            _check_path(config, match[1])


def _check_path(config: Config, path: str) -> None:
    try:
        parts = config_path.split(path)
    except ValueError:
        raise UserError(f"--config.{path}: not a path of keys like a.b") from None
    value, done = config, "config"
    for part in parts:
        value = _child(value, part, done, path)
        done += f"[{part}]" if isinstance(part, int) else f".{part}"
    holder_only = isinstance(value, tuple) and any(isinstance(v, Node) for v in value)
    if isinstance(value, Node) or holder_only:
        example = _keys(value[0] if holder_only else value)[:1]
        index = "[0]" if holder_only else ""
        raise UserError(
            f"--{done}: a flag cannot choose a class; set it in the config file, and "
            f"its values by --{done}{index}.{(example or ['...'])[0]}=..."
        )


def _child(value: Any, part: Any, done: str, path: str) -> Any:
    if value is None:
        raise UserError(
            f"--config.{path}: {done} is None in this config; set it in the file"
        )
    if isinstance(value, tuple) and isinstance(part, int):
        if not 0 <= part < len(value):
            raise UserError(f"--config.{path}: {done} has {len(value)} entries")
        return value[part]
    if not isinstance(value, Node):
        inside = f"{done}[0]" if isinstance(value, tuple) else f"{done}={value!r}"
        raise UserError(f"--config.{path}: {inside} has no key {part!r}")
    names = _keys(value)
    if part not in names:
        hint = nearest(str(part), names).replace("'", "")
        hint = hint.replace("mean ", f"mean --{done}.")
        raise UserError(
            f"--{done}.{part}: no such key{hint} (keys there: {', '.join(names)})"
        )
    return getattr(value, part)


def _keys(value: Node) -> list[str]:
    return list(getattr(value, "__dataclass_fields__", ()))
