"""Configs as JSON and back, and the difference of two of them.

JSON names the class of each sub-config. Only classes of moe_jax are loaded, so a file
cannot run code of its choice.
"""

import dataclasses
import importlib
import json
import re
from typing import Any

from moe_jax.config import Config, Node
from moe_jax.errors import UserError, nearest


def to_dict(value: Any) -> Any:
    """A config as JSON-ready data; `class` names the class of each sub-config."""
    if isinstance(value, Node):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"class": name} | {k: to_dict(v) for k, v in fields.items()}
    if isinstance(value, tuple):
        return [to_dict(v) for v in value]
    return value


def _class_named(name: str) -> type[Node]:
    module, _, attribute = str(name).rpartition(".")
    if not re.fullmatch(r"moe_jax(\.\w+)*\.\w+", str(name), re.ASCII):
        raise UserError(f"config class {name!r}: only classes of moe_jax are loaded")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"config class {name!r} is not known here: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Node)):
        raise UserError(f"config class {name!r} is not a config class")
    return found


def from_dict(data: Any) -> Any:
    """The inverse of `to_dict`.

    Raises:
      UserError: unknown class or field (the nearest name is offered).
    """
    if isinstance(data, list):
        return tuple(from_dict(v) for v in data)
    if not isinstance(data, dict):
        return data
    if "class" not in data:
        raise UserError(f"a config object without 'class': {sorted(data)[:5]}")
    cls = _class_named(data["class"])
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key != "class" and key not in names:
            raise UserError(
                f"{data['class']} has no field {key!r}{nearest(key, names)}"
            )
    return cls(**{k: from_dict(v) for k, v in data.items() if k != "class"})


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Raises UserError where the text is not a config."""
    try:
        config = from_dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"not a saved config: {error}") from None
    if not isinstance(config, Config):
        raise UserError("not a saved config: the outermost object is no Config")
    return config


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """Lines `path: old -> new` for every leaf that differs."""
    if isinstance(old, Node) and type(old) is type(new):
        names = [f.name for f in dataclasses.fields(old)]
        pairs = ((n, getattr(old, n), getattr(new, n)) for n in names)
        return [line for n, a, b in pairs for line in differences(a, b, f"{path}.{n}")]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
