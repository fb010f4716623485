"""The table of contents of one checkpoint: JSON beside the arrays."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moe_jax.checkpoint import trees
from moe_jax.errors import UserError

# Raise this when the layout on disk changes; old layouts are refused.
FORMAT = 1


def make(
    step: int, data: dict, leaves: Mapping[str, Any], sums: Mapping[str, str]
) -> dict:
    """Describes a step.

    Args:
      step: number of the step.
      data: what the caller wants back with the state; must be JSON.
      leaves: arrays by name.
      sums: their checksums.

    Returns:
      `{"format", "step", "data", "leaves": {name: {"array", "checksum"}}, "sha256"}`.

    Raises:
      TypeError: `data` is not JSON.
    """
    body = {
        "format": FORMAT,
        "step": int(step),
        "data": data,
        "leaves": {
            name: {"array": trees.describe(leaf), "checksum": sums[name]}
            for name, leaf in leaves.items()
        },
    }
    # Through JSON once, so that the hash is of what a reader will see (a tuple
    # becomes a list, an integer key a string).
    body = json.loads(json.dumps(body))
    return body | {"sha256": _hash(body)}


def check(found: Any, step: int) -> None:
    """Checks that `found` is the whole manifest of `step`.

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
    if body["step"] != step:
        raise ValueError(f"its manifest is that of step {body['step']}")


def _hash(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
