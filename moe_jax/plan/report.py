"""The plan of a train step: what its compiled program needs, does and waits for."""

import dataclasses
import importlib.metadata
from typing import Any

import jax

from moe_jax.config import Config
from moe_jax.errors import RunError
from moe_jax.parallel import rules
from moe_jax.plan import hlo, host_copies, memory, program, schedule
from moe_jax.plan.collectives import Network
from moe_jax.plan.memory import Memory, WeightShapes
from moe_jax.plan.program import Program
from moe_jax.plan.topology import Topology
from moe_jax.plan.totals import Totals
from moe_jax.train.setup import Parts

_BOUNDS = {
    "matmul_seconds": "matrix products",
    "memory_seconds": "HBM bandwidth",
    "exposed_seconds": "exposed collectives",
    "host_seconds": "copies to the host and back",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveRow:
    """One kind of collective over some mesh axes, all of a step, one device.

    Attributes:
      kind: "all-gather" and so on.
      axes: of the mesh.
      count: executions.
      payload_bytes: of the operations: inputs, of all-gathers results.
      wire_bytes: sent.
      seconds: modelled.
      exposed_seconds: of those, while the core waits.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    payload_bytes: int
    wire_bytes: int
    seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopRow:
    """A loop whose passes depend on data.

    Attributes:
      name: of the instruction.
      where: name stack.
      met: times a step comes to it.
      assumed: passes each time, in all figures.
      seconds: of one pass, modelled.
    """

    name: str
    where: str
    met: int
    assumed: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostRow:
    """Copies between a device and its host in one direction, all of a step.

    Attributes:
      direction: "to the host" or "from the host".
      count: of copies.
      nbytes: of all of them.
      seconds: of all of them, hidden or not.
      exposed_seconds: that the device waits for them.
    """

    direction: str
    count: int
    nbytes: int
    seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What one device does in a step; seconds are modelled, not measured.

    Attributes:
      executed_flops: matrix products and kernels, recomputation included.
      kernel_flops: of those, in hand-written kernels.
      hbm_bytes: read and written.
      wire_bytes: sent to other devices.
      seconds: the step.
      matmul_seconds: of those, bound by the matrix units.
      memory_seconds: bound by HBM.
      exposed_seconds: waiting for collectives.
      link_seconds: of all collectives, hidden ones too.
      collectives: the longest exposed first.
      host: copies to the host and back.
      loops: that depend on data.
      scopes: seconds by part of the model, without waiting for asynchronous work.
      unknown_kernels: kernels whose FLOPs are not counted.
    """

    executed_flops: float
    kernel_flops: float
    hbm_bytes: float
    wire_bytes: float
    seconds: float
    matmul_seconds: float
    memory_seconds: float
    exposed_seconds: float
    link_seconds: float
    collectives: tuple[CollectiveRow, ...]
    host: tuple[HostRow, ...]
    loops: tuple[LoopRow, ...]
    scopes: dict[str, float]
    unknown_kernels: tuple[str, ...]

    @property
    def host_seconds(self) -> float:
        """Waiting for copies to the host and back."""
        return sum(row.exposed_seconds for row in self.host)

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        return _BOUNDS[max(_BOUNDS, key=lambda name: getattr(self, name))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `moe-jax plan` says.

    Attributes:
      topology: name.
      slices: of it.
      num_chips: over all slices.
      num_devices: JAX devices.
      mesh: axis sizes.
      compiler: name and version.
      compile_seconds: on this machine.
      capacity_bytes: that a program may use; None: unknown.
      memory: at the peak of one device.
      host_bytes: that lie in the memory of the host for one device.
      compiler_peak_bytes: as the compiler itself counts; None: it did not say.
      refused: the compiler itself found too little memory.
      tokens: per step, all devices; of images, patches.
      model_flops: useful ones per device and step (6 per active weight and token,
        causal attention halved).
      peak_flops: of the device per second; 0: unknown.
      step: None where the host's compiler stands in.
      token_name: what people call them, in the plural.
    """

    topology: str
    slices: int
    num_chips: int
    num_devices: int
    mesh: dict[str, int]
    compiler: str
    compile_seconds: float
    capacity_bytes: int | None
    memory: Memory
    host_bytes: int
    compiler_peak_bytes: int | None
    refused: bool
    tokens: int
    model_flops: float
    peak_flops: float
    step: Step | None
    token_name: str = "tokens"

    @property
    def fits(self) -> bool | None:
        """Whether the step fits in memory; None where that is not known."""
        if self.capacity_bytes is None:
            return None
        return not self.refused and self.memory.allocated_bytes <= self.capacity_bytes

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the device could do in the modelled time."""
        return self.model_flops / self.peak_flops / self.step.seconds

    @property
    def tokens_per_chip_hour(self) -> float:
        return self.tokens / self.num_chips / self.step.seconds * 3600

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, with what follows from it."""
        found = dataclasses.asdict(self)
        found["memory"] = dict(self.memory.classes)
        found["largest_buffers"] = [
            dataclasses.asdict(b) for b in self.memory.largest[:20]
        ]
        found["peak_bytes"] = self.memory.peak_bytes
        found["allocated_bytes"] = self.memory.allocated_bytes
        found["fits"] = self.fits
        if self.step is not None:
            step = found.pop("step")
            found["step_seconds"] = step.pop("seconds")
            found |= step
            found["bound"] = self.step.bound
            found["mfu"] = self.mfu
            found["tokens_per_chip_hour"] = self.tokens_per_chip_hour
        return found


def make_plan(
    config: Config,
    topology: Topology,
    *,
    loop_passes: float = 0.0,
    dump_folder: str | None = None,
    quick: bool = False,
) -> Plan:
    """Compiles the train step and measures the program.

    Args:
      config: the experiment.
      topology: of the devices.
      loop_passes: assumed of loops whose passes depend on data.
      dump_folder: where the compiler's files stay.
      quick: without machine code and cycle estimates; see `program.compile_program`.

    Raises:
      UserError: the config does not suit the topology.
    """
    compiled = program.compile_program(
        config, topology, dump_folder=dump_folder, quick=quick
    )
    return from_program(config, compiled, loop_passes)


def from_program(config: Config, compiled: Program, loop_passes: float = 0.0) -> Plan:
    """The plan of a compiled step.

    Raises:
      RunError: the compiler stopped before there was a program to read.
    """
    parts, topology = compiled.parts, compiled.topology
    if not compiled.text:
        why = compiled.out_of_memory or "it wrote no program"
        raise RunError(f"the compiler stopped early for {topology}: {why}")
    module = hlo.parse(compiled.text)
    chip = topology.chip
    rows, length = config.train.batch_size, config.positions()
    per_row = parts.model.flops_per_row(length)
    step = None
    if chip is not None:
        network = Network.of(parts.mesh, chip)
        totals = schedule.Walk(module, network, passes=loop_passes).run()
        step = _step(totals, module, loop_passes)
    return Plan(
        topology=topology.name,
        slices=topology.slices,
        num_chips=topology.num_chips,
        num_devices=len(topology.devices),
        mesh=dict(parts.mesh.shape),
        compiler=_compiler(topology),
        compile_seconds=compiled.compile_seconds,
        capacity_bytes=int(chip.hbm_bytes) if chip else None,
        memory=memory.at_peak(
            module,
            compiled.buffers,
            compiled.live_ranges,
            _weight_shapes(config, parts),
        ),
        host_bytes=host_copies.host_bytes(compiled.buffers),
        compiler_peak_bytes=compiled.peak_bytes,
        refused=bool(compiled.out_of_memory),
        tokens=rows * length,
        model_flops=per_row * rows / len(topology.devices),
        peak_flops=chip.flops if chip else 0.0,
        step=step,
        token_name="patches" if config.model.data_kind == "images" else "tokens",
    )


def _compiler(topology: Topology) -> str:
    versions = [f"jax {jax.__version__}"]
    if topology.chip is None:
        return f"the host's compiler, {versions[0]}"
    return f"libtpu {importlib.metadata.version('libtpu')}, {versions[0]}"


def _weight_shapes(config: Config, parts: Parts) -> WeightShapes:
    rows = parts.eval_batch_size // rules.size(parts.mesh, "batch")
    length = config.positions() // rules.size(parts.mesh, "sequence")
    width = config.model.d_model
    hidden = [(rows, length, width), (rows * length, width)]
    return WeightShapes(parts.abstract.params, "segment_", hidden)


def _step(totals: Totals, module: hlo.Module, loop_passes: float) -> Step:
    rows = [
        CollectiveRow(
            kind=kind,
            axes=axes,
            count=round(t.count),
            payload_bytes=round(t.payload),
            wire_bytes=round(t.wire),
            seconds=t.seconds,
            exposed_seconds=t.exposed,
        )
        for (kind, axes), t in totals.traffic.items()
    ]
    sources = {
        i.name: i.op_name for c in module.computations.values() for i in c.instructions
    }
    found = [
        LoopRow(
            name=name,
            where=sources[name],
            met=round(met),
            assumed=loop_passes,
            seconds=once.seconds,
        )
        for name, (met, once) in totals.dynamic.items()
    ]
    return Step(
        executed_flops=totals.flops,
        kernel_flops=totals.kernel_flops,
        hbm_bytes=totals.hbm_bytes,
        wire_bytes=sum(row.wire_bytes for row in rows),
        seconds=totals.seconds,
        matmul_seconds=totals.matmul_seconds,
        memory_seconds=totals.memory_seconds,
        exposed_seconds=totals.exposed_seconds,
        link_seconds=totals.link_seconds,
        collectives=tuple(sorted(rows, key=lambda r: -r.exposed_seconds)),
        host=tuple(
            HostRow(
                direction=direction,
                count=round(t.count),
                nbytes=round(t.payload),
                seconds=t.seconds,
                exposed_seconds=t.exposed,
            )
            for direction, t in sorted(totals.host.items())
        ),
        loops=tuple(found),
        scopes=dict(sorted(totals.scopes.items(), key=lambda item: -item[1])),
        unknown_kernels=tuple(sorted(totals.unknown)),
    )
