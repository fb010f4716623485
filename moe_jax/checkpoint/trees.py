"""Pytrees as named leaves, and readable differences between two of them."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

_MOST_LINES = 12


def named_leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a pytree by path, such as `params/layers/w_in`.

    Names are dict keys, field names and positions, so that they do not change when a
    dict becomes a dataclass. Empty nodes (None, an empty NamedTuple) have no leaves.

    Args:
      tree: any pytree.
      prefix: path put before all names.

    Raises:
      ValueError: a leaf without a name, two leaves of one name, or a key with a
        character that separates names on disk.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        for key in keys:
            if not key or "/" in key or "." in key:
                raise ValueError(
                    f"key {key!r} in {keys}: must not be empty or have / ."
                )
        name = "/".join(([prefix] if prefix else []) + keys)
        if not name or name in named:
            raise ValueError(f"leaf name {name!r} is {'given twice' if name else ''}")
        named[name] = leaf
    return named


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain dicts of named leaves.

    Raises:
      ValueError: a name is both a leaf and a folder of leaves.
    """
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return root


def check_targets(targets: Mapping[str, Any]) -> None:
    """Checks that every target says on which devices it wants to lie.

    Raises:
      ValueError: a sharding is missing or has only an abstract mesh, as those that
        `jax.eval_shape` yields do.
    """
    for name, target in targets.items():
        sharding = getattr(target, "sharding", None)
        abstract = isinstance(sharding, NamedSharding) and not isinstance(
            sharding.mesh, Mesh
        )
        if sharding is None or abstract:
            raise ValueError(f"{name}: needs a sharding on devices, has {sharding}")


def describe(leaf: Any) -> str:
    """Type and shape, such as `float32[4, 8]`."""
    return f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"


def differences(saved: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Lines on what differs between two tables of name to type and shape.

    At most 12 lines; the last one counts those left out.
    """
    lines = [
        f"missing in the checkpoint: {n} {wanted[n]}" for n in wanted if n not in saved
    ]
    lines += [
        f"only in the checkpoint: {n} {saved[n]}" for n in saved if n not in wanted
    ]
    lines += [
        f"{name}: {saved[name]} -> {wanted[name]}"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    if len(lines) > _MOST_LINES:
        left_out = len(lines) - (_MOST_LINES - 1)
        lines[_MOST_LINES - 1 :] = [f"... and {left_out} more"]
    return lines
