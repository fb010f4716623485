"""A checkpoint of DiT or DiT-MoE becomes a workdir."""

import copy
import dataclasses
from collections.abc import Callable

import jax

from moe_jax import config as config_lib
from moe_jax.config import Config, MeshConfig
from moe_jax.convert import load, mapping, new_run, target, tensor_file
from moe_jax.convert.dit import compare, table
from moe_jax.convert.quantized import Tensor
from moe_jax.errors import UserError
from moe_jax.train import setup


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      file: of tensors.
      workdir: to be made.
      config: of the model and of the run.
      dtype: of the parameters; "": as the config has it.
      mesh: to lay them out on; None: that of the config.
    """

    file: str
    workdir: str
    config: Config
    dtype: str = ""
    mesh: MeshConfig | None = None


def config_of(request: Request) -> Config:
    """The config that the workdir gets, validated.

    Raises:
      UserError: it breaks a rule, or its model is none that such files hold.
    """
    config = copy.deepcopy(request.config)
    if lines := table.lost(config.model):
        raise UserError(
            "--config: its model is not one of DiT or DiT-MoE:\n  " + "\n  ".join(lines)
        )
    if config.checkpoint.folder:
        raise UserError(
            f"--config.checkpoint.folder={config.checkpoint.folder}: an imported model "
            "is written to the workdir; leave it empty"
        )
    if request.dtype:
        config.model.param_dtype = request.dtype
    if request.mesh is not None:
        config.mesh = request.mesh
    return config_lib.validate(config)


def convert(
    tensors: dict[str, Tensor],
    config: Config,
    request: Request,
    say: Callable[[str], None],
) -> None:
    """Makes the workdir.

    Args:
      tensors: of `read`.
      config: of `config_of`; JAX has been started for its mesh.
      request: what is asked for.
      say: shows a line to the user.

    Raises:
      UserError: file and config differ, a value is not finite, or the folder cannot be
        written; there is none then.
    """
    parts = setup.make_parts(config)
    abstract, segments = parts.abstract, parts.model.segments
    leaves = mapping.leaves_of(abstract.all_params, abstract.router_state)
    wanted = mapping.places_of(
        table.parts(config.model, segments), leaves, "DiT's files"
    )
    compare.check(wanted, tensors, config.model, request.file)
    names = {place.hub for place in wanted}
    say(f"{len(names)} tensors, and {table.POSITIONS}, which is computed here")
    with target.made_whole(request.workdir, "workdir") as made:
        with jax.set_mesh(parts.mesh):
            found = load.arrays(wanted, tensors, leaves)
        new_run.save(parts, found, made, request.file)


def read(path: str) -> dict[str, Tensor]:
    """The header of a file; no weights.

    Raises:
      UserError: it cannot be read, or is damaged.
    """
    if path.endswith((".pt", ".pth", ".bin")):
        raise UserError(
            f"--file={path} holds pickled tensors; make a safetensors file of it first:"
            f" moe-jax convert pt-to-safetensors --file={path} --out=model.safetensors"
        )
    stored = tensor_file.read_header(path)
    return {
        name: Tensor(name, entry.path, entry.shape, entry.type_name, entry.array)
        for name, entry in stored.items()
    }
