"""The table of contents of one checkpoint: JSON beside the arrays."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.checkpoint import experts, trees
from moe_jax.checkpoint.checksums import total
from moe_jax.checkpoint.failures import DamagedError
from moe_jax.errors import UserError

# Raise this when the layout on disk changes; old layouts are refused.
FORMAT = 1


def make(
    step: int,
    data: dict,
    leaves: Mapping[str, Any],
    parts: Mapping[str, Sequence[str]],
    dimensions: Mapping[str, int],
) -> dict:
    """Describes a step.

    Args:
      step: number of the step.
      data: what the caller wants back with the state; must be JSON.
      leaves: arrays by name.
      parts: of `checksums.in_parts`.
      dimensions: which dimension of a leaf counts experts, by name.

    Returns:
      `{"format", "step", "data", "leaves": {name: {"array", "checksum"}}, "experts",
      "sha256"}`; see `experts.py`.

    Raises:
      TypeError: `data` is not JSON.
    """
    body = {
        "format": FORMAT,
        "step": int(step),
        "data": data,
        "leaves": {
            name: {"array": trees.describe(leaf), "checksum": total(parts[name])}
            for name, leaf in leaves.items()
        },
        "experts": experts.make(leaves, dimensions, parts),
    }
    # Through JSON once, so that the hash is of what a reader will see (a tuple
    # becomes a list, an integer key a string).
    body = json.loads(json.dumps(body))
    experts.check(body["experts"], body["leaves"], step)
    return body | {"sha256": _hash(body)}


def check(found: Any, step: int) -> dict[str, int]:
    """Checks that `found` is the whole manifest of `step`.

    Returns:
      Which dimension of a leaf counts experts, by name; of checkpoints that were made
      before they were listed, nothing.

    Raises:
      ValueError: it is damaged.
      UserError: it is whole, but of a format that this version does not read.
    """
    if not isinstance(found, dict) or "sha256" not in found:
        raise ValueError("the manifest is not one")
    body = {key: value for key, value in found.items() if key != "sha256"}
    if _hash(body) != found["sha256"]:
        raise ValueError("the manifest's checksum differs")
    if body.get("format") != FORMAT:
        raise UserError(
            f"step {step} has checkpoint format {body.get('format')}; this version of "
            f"moe_jax reads format {FORMAT}: use the version that wrote it"
        )
    if body.get("step") != step:
        raise ValueError(f"its manifest is that of step {body.get('step')}")
    # The hash says that it is as it was written, not that this program wrote it.
    leaves = body.get("leaves")
    if not isinstance(body.get("data"), dict) or not isinstance(leaves, dict):
        raise ValueError("the manifest has no leaves or no data")
    for name, entry in leaves.items():
        if not _is_entry(entry):
            raise ValueError(f"the manifest's entry of leaf {name} is not one")
    if "experts" not in body:
        return {}
    experts.check(body["experts"], leaves, step)
    return experts.dimensions(body["experts"])


def check_layout(
    step: int, found: Mapping[str, int], wanted: Mapping[str, int]
) -> None:
    """Checks that experts lie in the dimension that the config has them in.

    Args:
      step: of the checkpoint.
      found: of `check`.
      wanted: the same by the config; leaves that only one of both has do not count.

    Raises:
      UserError: a leaf has them in another.
    """
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            raise UserError(
                f"step {step}: leaf {name} has its experts in dimension {found[name]}, "
                f"this config in {wanted[name]}; use the version of moe_jax that wrote "
                "it"
            )


def verify(contents: Mapping[str, Any], parts: Mapping[str, Sequence[str]]) -> None:
    """Compares checksums of leaves that were read with those of a checked manifest.

    Args:
      contents: the manifest.
      parts: of `checksums.in_parts`, of any of its leaves.

    Raises:
      DamagedError: some differ; the first leaf is named, and its experts.
    """
    saved = contents["leaves"]
    bad = [name for name in parts if total(parts[name]) != saved[name]["checksum"]]
    if not bad:
        return
    first, which = bad[0], ""
    if entry := contents.get("experts", {"leaves": {}})["leaves"].get(first):
        which = f" ({experts.differing(entry, parts[first])})"
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise DamagedError(f"leaf {first}{which}{more}: checksum differs")


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("array"), str)
        and re.fullmatch(r"\w+\[(\d+(, \d+)*)?\]", entry["array"], re.ASCII) is not None
        and experts.is_checksum(entry.get("checksum"))
    )


def _hash(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
