"""The device mesh: five named axes, all always present (size 1 where unused)."""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from moe_jax.config import MeshConfig
from moe_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")
TOKEN_AXES = ("data", "fsdp", "expert", "context")


def count_slices(devices: list) -> int:
    """How many TPU slices the devices are in; 1 on other platforms."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(d, "slice_index", 0) for d in devices})


def _device_grid(shape: tuple[int, ...], devices: list) -> np.ndarray:
    slices = count_slices(devices)
    if slices > 1:
        if shape[0] % slices:
            raise UserError(
                f"config.mesh.data={shape[0]} is not divisible by the {slices} "
                "slices: only the data axis spans slices"
            )
        inner = (shape[0] // slices, *shape[1:])
        outer = (slices,) + (1,) * (len(shape) - 1)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    if devices[0].platform == "cpu":
        return np.array(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def make_mesh(config: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """A mesh with the axes `AXES` over `devices` (default: all there are).

    Axes are `Auto`: the compiler places collectives outside `shard_map`. A weight must
    not be replicated by hand there: its gradient would be an all-reduce.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    need = math.prod(sizes.values())
    if need != len(devices):
        shown = " * ".join(f"{k}={v}" for k, v in sizes.items())
        raise UserError(
            f"--config.mesh needs {need} devices ({shown}) but there are "
            f"{len(devices)} of kind {devices[0].device_kind!r}; the product of the "
            "axes must be the number of devices (data=-1 takes what remains): set "
            "them so, on one device all to 1. On a CPU, "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N makes N devices"
        )
    shape = tuple(sizes[a] for a in AXES)
    return jax.sharding.Mesh(
        _device_grid(shape, devices),
        AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    )


def _device() -> Any:
    """What the mesh says of its devices; None without a mesh, or of fake devices."""
    return jax.sharding.get_abstract_mesh().abstract_device


def device_kind() -> str:
    """As JAX names it; "" without a mesh."""
    device = _device()
    return device.device_kind if device else ""


def platform() -> str:
    """The platform that the program is traced for: "cpu", "gpu" or "tpu".

    A mesh knows its devices, also where they are absent; without one it is the
    default backend.
    """
    device = _device()
    found = device.platform if device else jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(found, found)
