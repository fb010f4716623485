"""summary.json: how a run ended, for people and for scripts that compare runs."""

import json
import os
import platform
from importlib import metadata
from typing import Any

from moe_jax.observe import writers

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """What the figures were made with: packages, Python and the device."""
    import jax

    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    device = jax.devices()[0]
    return found | {"platform": device.platform, "device_kind": device.device_kind}


def write_summary(path: str | os.PathLike, figures: dict[str, Any]) -> None:
    """Writes summary.json atomically.

    Args:
      path: the file.
      figures: nested figures of any shape. The trainer writes `step`, `losses`,
        `held_out`, `baselines`, `seconds`, `compile_seconds`, `tokens_per_second`,
        `drops` and `mesh`. `versions` is added where it is missing.
    """
    data = writers.jsonable(figures)
    if "versions" not in data:
        data["versions"] = versions()
    writers.write_atomically(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
