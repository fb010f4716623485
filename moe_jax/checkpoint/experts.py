"""Which experts a checkpoint holds, where they lie, and a checksum of each.

A part of the manifest (JSON):

    {"version": 1, "leaves": {NAME: {
        "count": experts, "dimension": of the array that counts them,
        "layers": sizes of the dimensions before it ([] where layers are not stacked),
        "order": "ascending" (expert e lies at position e),
        "checksums": one an expert, over all layers}}}

The checksums of a leaf's experts add up to that of the leaf, and depend on where an
expert lies: of two that changed places both are named.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.checkpoint.checksums import total
from moe_jax.errors import UserError

VERSION = 1
_ORDER = "ascending"
_MOST_NAMED = 8


def make(
    leaves: Mapping[str, Any],
    dimensions: Mapping[str, int],
    parts: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Describes the experts of a state.

    Args:
      leaves: arrays by name.
      dimensions: which dimension of a leaf counts experts, by name.
      parts: checksums by name, for these leaves one an expert.
    """
    entries = {}
    for name, dim in dimensions.items():
        shape = leaves[name].shape
        entries[name] = {
            "count": shape[dim],
            "dimension": dim,
            "layers": list(shape[:dim]),
            "order": _ORDER,
            "checksums": list(parts[name]),
        }
    return {"version": VERSION, "leaves": entries}


def check(found: Any, leaves: Mapping[str, Mapping[str, str]], step: int) -> None:
    """Checks that a description fits the leaves of its manifest.

    Args:
      found: the description.
      leaves: entries of the manifest, by name.
      step: of the checkpoint, for messages.

    Raises:
      ValueError: it does not; the message names leaf and rule.
      UserError: it is of a version that is not read here.
    """
    if not isinstance(found, dict) or type(found.get("version")) is not int:
        raise ValueError("the manifest's list of experts is not one")
    if found["version"] != VERSION:
        raise UserError(
            f"step {step} lists its experts in version {found['version']}; this "
            f"version of moe_jax reads version {VERSION}: use the one that wrote it"
        )
    if not isinstance(found.get("leaves"), dict):
        raise ValueError("the manifest's list of experts is not one")
    for name, entry in found["leaves"].items():
        if name not in leaves:
            raise ValueError(f"experts of leaf {name!r}, which the manifest lacks")
        if not isinstance(entry, dict):
            raise ValueError(f"leaf {name}: its list of experts is not one")
        text = leaves[name]["array"]
        _check_entry(name, entry, json.loads(text[text.index("[") :]))
        if total(entry["checksums"]) != leaves[name]["checksum"]:
            raise ValueError(
                f"leaf {name}: its experts' checksums do not add up to its own"
            )


def _check_entry(name: str, entry: Mapping[str, Any], shape: list[int]) -> None:
    dim, count, sums = (entry.get(k) for k in ("dimension", "count", "checksums"))
    if type(dim) is not int or not 0 <= dim < len(shape):
        raise ValueError(f"leaf {name} {shape} has no dimension {dim!r} of experts")
    if count != shape[dim] or entry.get("layers") != shape[:dim]:
        raise ValueError(
            f"leaf {name} {shape}: the manifest lists {count} experts for layers "
            f"{entry.get('layers')}, the array has {shape[dim]} for {shape[:dim]}"
        )
    if entry.get("order") != _ORDER:
        raise ValueError(f"leaf {name}: experts lie in order {entry.get('order')!r}")
    if not isinstance(sums, list) or len(sums) != count:
        raise ValueError(f"leaf {name}: not one checksum for each of {count} experts")
    if not all(map(is_checksum, sums)):
        raise ValueError(f"leaf {name}: an expert's checksum is not one")


def is_checksum(value: Any) -> bool:
    """Whether a value is 16 hexadecimal digits, as `checksums` writes them."""
    return (
        isinstance(value, str)
        and len(value) == 16
        and all(digit in "0123456789abcdef" for digit in value)
    )


def dimensions(found: Mapping[str, Any]) -> dict[str, int]:
    """Which dimension of a leaf counts experts, by name, of a checked description."""
    return {name: entry["dimension"] for name, entry in found["leaves"].items()}


def differing(entry: Mapping[str, Any], parts: Sequence[str]) -> str:
    """The experts of a leaf whose checksums differ, such as `experts 3, 7`."""
    pairs = enumerate(zip(entry["checksums"], parts, strict=True))
    bad = [expert for expert, (saved, found) in pairs if saved != found]
    if len(bad) == 1:
        return f"expert {bad[0]}"
    named = ", ".join(map(str, bad[:_MOST_NAMED]))
    more = len(bad) - _MOST_NAMED
    return f"experts {named}" + (f" and {more} more" if more > 0 else "")
