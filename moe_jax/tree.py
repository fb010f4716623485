"""Pytrees: frozen dataclasses, and names of leaves."""

import dataclasses
from typing import Any

import jax


def struct(cls=None, *, static: tuple[str, ...] = ()):
    """A frozen dataclass that is a pytree; `static` fields are not traced."""

    def wrap(cls):
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        data = [n for n in names if n not in static]
        return jax.tree_util.register_dataclass(cls, data, list(static))

    return wrap if cls is None else wrap(cls)


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as `a/b/0/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """Leaves by their path names, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {path_name(path): leaf for path, leaf in leaves}
