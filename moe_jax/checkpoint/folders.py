"""The folder of a run's checkpoints, apart from what Orbax does with it."""

import json

from etils import epath

from moe_jax.checkpoint.failures import reason
from moe_jax.errors import UserError

# Where steps go that a resumed run does not build on. Orbax takes it for no step.
SET_ASIDE = "set_aside"
# A small file of Orbax in each step, with times and names. It does without, but one
# damaged file keeps it from listing all steps.
_METADATA = "_CHECKPOINT_METADATA"
# What Orbax takes in it; each field may be null or missing. (Handlers that are one
# string are another kind of checkpoint than ours.)
_FIELDS = {
    "item_handlers": dict,
    "metrics": dict,
    "performance_metrics": dict,
    "init_timestamp_nsecs": int,
    "commit_timestamp_nsecs": int,
    "custom_metadata": dict,
}


def has_entries(folder: epath.Path) -> bool:
    """Whether a folder is there and not empty."""
    try:
        return any(folder.iterdir())
    except FileNotFoundError:  # A writer deleted it just now.
        return False


def set_aside(folder: epath.Path, step: int) -> None:
    """Moves a step to where it is neither listed nor lost."""
    aside = folder / SET_ASIDE
    aside.mkdir(exist_ok=True)
    target, copies = aside / str(step), 0
    while target.exists():
        copies += 1
        target = aside / f"{step}.{copies}"
    (folder / str(step)).rename(target)


def mend(folder: epath.Path) -> list[str]:
    """Renames damaged files that keep the steps from being listed.

    Returns:
      What was done, in lines for the user.
    """
    bad = _damaged(folder)
    for path in bad:
        path.rename(path.parent / f"{_METADATA}.damaged")
    return [
        f"{path} was damaged and is renamed; the step is read without it"
        for path in bad
    ]


def unlistable(folder: epath.Path, error: Exception) -> UserError:
    """What to say where Orbax cannot list the steps, and nothing may be renamed."""
    where = ", ".join(map(str, _damaged(folder))) or f"a file {_METADATA} of one"
    return UserError(
        f"the checkpoints in {folder} cannot be listed ({reason(error)}): {where} is "
        "damaged; delete it (it holds times and names only, and the arrays have "
        "checksums of their own), or let moe-jax train go on, which renames it"
    )


def _damaged(folder: epath.Path) -> list[epath.Path]:
    # Not those of unfinished saves, which Orbax passes over.
    found = [
        path for path in folder.glob(f"*/{_METADATA}") if path.parent.name.isdigit()
    ]
    return sorted(path for path in found if not _is_metadata(path))


def _is_metadata(path: epath.Path) -> bool:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(found, dict):
        return False
    known = all(
        found.get(name) is None or isinstance(found[name], kind)
        for name, kind in _FIELDS.items()
    )
    # Orbax takes other fields for custom ones, where there are none.
    return known and not (found.get("custom_metadata") and found.keys() - _FIELDS)
