"""A workdir's model becomes a file with the names of DiT's and DiT-MoE's authors."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import Config
from moe_jax.convert import mapping, store, target
from moe_jax.convert.dit import compare, table
from moe_jax.errors import UserError
from moe_jax.infer import load
from moe_jax.train.setup import Parts

TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def convert(
    workdir: str,
    out: str,
    config: Config,
    *,
    dtype: str = "",
    step: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the model of a workdir as one file.

    Args:
      workdir: of a run.
      out: the file, which is not there yet.
      config: of the run, with the mesh to load it on; JAX has been started for it.
      dtype: one of `TYPES`; "": as the parameters are.
      step: of the checkpoint; 0: the newest.
      say: shows a line to the user.

    Raises:
      UserError: such a file does not express the model, or cannot be written, or
        several processes were started.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"one process writes --out={out}, but {jax.process_count()} were started; "
            "start one, with --mesh for the devices that it has"
        )
    if lines := table.lost(config.model):
        raise UserError(
            "this model is not one of DiT or DiT-MoE:\n  " + "\n  ".join(lines)
        )
    loaded = load.load(workdir, config, step)
    for note in loaded.notes:
        say(note)
    state = loaded.state
    leaves = mapping.leaves_of(state.eval_params, state.router_state)
    say(write(out, loaded.parts, leaves, dtype))


def write(out: str, parts: Parts, leaves: Mapping[str, Any], dtype: str = "") -> str:
    """Writes arrays as one file.

    Args:
      out: the file.
      parts: of the run.
      leaves: of `mapping.leaves_of`.
      dtype: as for `convert`.

    Returns:
      A line about what was written.

    Raises:
      UserError: the file cannot be written, or the model has weights without a name.
    """
    options = parts.config.model
    fixed = jnp.asarray(compare.positions(options), "float32")
    leaves = {**leaves, f"{mapping.PARAMS}/{table.POSITIONS}": fixed}
    rows = table.parts(options, parts.model.segments)
    tensors = store.by_tensor(mapping.places_of(rows, leaves, "DiT's files"))
    kind = TYPES[dtype or options.param_dtype]
    planned = store.planned(tensors, dict.fromkeys(tensors, kind))
    with target.file_made_whole(out, "out") as made:
        folder, name = os.path.split(made)
        with jax.set_mesh(parts.mesh):
            store.write(folder, tensors, {name: planned}, leaves)
    size = sum(tensor.nbytes for tensor in planned)
    return f"{out}: {len(tensors)} tensors, {size:,} bytes"
