"""The devices of a topology that is not there, by its name.

`v5p:4x4x4` names a TPU slice; `cpu:8` fake devices of this host, whose compiler
stands in where the real one is missing (memory only).
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from moe_jax.errors import UserError
from moe_jax.plan import chips
from moe_jax.plan.chips import Chip

_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # No metadata server: this is no TPU machine.
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Two compilations at once.
}
_NAME = re.compile(r"([^:]+):([1-9]\d*(?:x[1-9]\d*)*)((?:_twisted|_untwisted)?)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as given, "v5p:4x4x4".
      slices: how many of them.
      chip: the kind of TPU; None for the host's fake devices.
      devices: of JAX, all slices.
    """

    name: str
    slices: int
    chip: Chip | None
    devices: Sequence[Any]

    @property
    def num_chips(self) -> int:
        return len(self.devices) // (self.chip.devices_per_chip if self.chip else 1)

    def __str__(self) -> str:
        times = f"{self.slices} x " if self.slices > 1 else ""
        return f"{times}{self.name}, {self.num_chips} chips"


def describe_names() -> str:
    """The names that `find` knows, in one line."""
    kinds = "|".join(chip.name for chip in chips.CHIPS)
    return (
        f"KIND:SHAPE with KIND one of {kinds} and SHAPE the chips along each axis "
        "(v2, v3, v5e, v6e: AxB; v4, v5p, tpu7x: AxBxC; A and B even, or 1x1), such "
        "as v5e:4x4, v5p:2x2x4, v6e:16x16; or cpu:N for N fake devices of this host"
    )


def _wrong(name: str, why: str) -> UserError:
    return UserError(
        f"--topology={name!r} is not a topology: {why}; it takes {describe_names()}"
    )


def find(name: str, slices: int = 1) -> Topology:
    """The topology of this name; libtpu knows which there are.

    Raises:
      UserError: no such topology, or libtpu is not installed.
    """
    if slices < 1:
        raise UserError(f"--slices={slices}: must be at least 1")
    match = _NAME.fullmatch(name)
    if not match:
        raise _wrong(name, "it is not KIND:SHAPE")
    kind, shape = match[1].lower(), [int(n) for n in match[2].split("x")]
    if kind == "cpu":
        return _host(name, math.prod(shape), slices)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU compiler: pip install 'moe_jax[plan]' "
            f"(libtpu; no TPU). Without it --topology=cpu:{math.prod(shape)} plans "
            "the memory with this host's compiler"
        )
    return _tpu(name, kind, shape, slices)


def _host(name: str, count: int, slices: int) -> Topology:
    import jax

    if slices != 1:
        raise UserError(f"--slices={slices}: {name} has no slices")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return Topology(name=name, slices=1, chip=None, devices=jax.devices()[:count])


def _tpu(name: str, kind: str, shape: list[int], slices: int) -> Topology:
    os.environ.update(_TPU_ENVIRONMENT)
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {}
    if kind in ("v4", "tpu v4"):
        options["chip_config_name"] = "megacore"  # Both cores as one device.
    if slices > 1:
        options["num_slices"] = slices
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise _wrong(name, str(error).removeprefix("INVALID_ARGUMENT: ")) from None
    devices = tuple(found.devices)
    chip = chips.BY_KIND.get(devices[0].device_kind)
    if chip is None:
        raise UserError(
            f"--topology={name}: libtpu knows {devices[0].device_kind!r}, but its "
            f"figures are missing here: add it to moe_jax/plan/chips.py"
        )
    return Topology(name=name, slices=slices, chip=chip, devices=devices)
