"""A walk over the compiled schedule: what the step does and how long it would take.

Instructions run in order on one core. One takes the longest of its FLOPs at the peak
rate, its HBM bytes at the bandwidth and, for matrix products, the compiler's own
cycle estimate. Collectives run beside it one after another, from their start to their
done, those between slices apart; where the core waits for one, it is exposed. A
synchronous one is all exposed.
Modelled: the figures compare programs; they are no measurement.
"""

import re
from collections.abc import Iterator

from moe_jax.plan import collectives, host_copies, kernels, loops, work
from moe_jax.plan.collectives import Collective, Network
from moe_jax.plan.hlo import Computation, Instruction, Module
from moe_jax.plan.totals import Totals, Traffic

_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
    "get-dimension-size",
}
_SCOPES = (
    "router",
    "dispatch",
    "combine",
    "experts",
    "shared",
    "attention",
    "feed_forward",
    "embedding",
    "logits",
    "optimizer",
)


def scope(op_name: str) -> str:
    """The part of the model that an operation belongs to; "other" if none."""
    words = re.split(r"[/()]+", op_name)
    return next((word for word in reversed(words) if word in _SCOPES), "other")


class Walk:
    """Runs a module's schedule in the model.

    Args:
      module: of the compiled program.
      network: mesh and chip.
      fill: share of grouped matmul rows that hold tokens.
      passes: assumed of loops that depend on data.
    """

    def __init__(self, module: Module, network: Network, fill=1.0, passes=0.0):
        self.module = module
        self.network = network
        self.fill = fill
        self.passes = passes
        self.meter = work.Meter(module)
        self._done: dict[str, Totals] = {}

    def run(self) -> Totals:
        return self.computation(self.module.entry)

    def computation(self, name: str) -> Totals:
        """One execution of a computation."""
        if name not in self._done:
            timeline = Timeline(self, self.module.computations[name])
            self._done[name] = timeline.run()
        return self._done[name]


class Timeline:
    """The clock of one computation, and what is in flight."""

    def __init__(self, walk: Walk, comp: Computation):
        self.walk = walk
        self.comp = comp
        self.total = Totals()
        self.free: dict[str, float] = {}  # When a network is, by its name.
        self.rendezvous: dict[str, str] = {}  # Of sends and recvs.
        self.flying: dict[str, tuple[float, Traffic | None]] = {}
        self.last_fused: tuple[float, Traffic | None] | None = None

    def run(self) -> Totals:
        for instruction in self.comp.instructions:
            if instruction.opcode not in _FREE:
                self._step(instruction)
        return self.total

    def _step(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode in ("while", "conditional", "call"):
            self._control(instruction)
        elif opcode in ("send", "recv"):
            self._exchange(instruction)
        elif opcode.endswith("-done"):
            self._land(instruction.operands)
        elif opcode.endswith("-start"):
            self._start(instruction)
        elif opcode in collectives.KINDS:
            self._blocking(self._measure(instruction, opcode, self.comp), instruction)
        elif opcode == "fusion":
            self._fusion(instruction)
        elif opcode == "custom-call" and not kernels.is_kernel(instruction):
            return  # Allocations, markers, layouts.
        elif opcode == "async-update":
            self._update(instruction)
        else:
            self._compute(instruction)

    def _control(self, instruction: Instruction) -> None:
        run, total = self.walk.computation, self.total
        if instruction.opcode == "call":
            total.add(run(instruction.reference("to_apply")))
        elif instruction.opcode == "conditional":
            branches = [run(name) for name in _branches(instruction)]
            total.add(max(branches, key=lambda t: t.seconds))
        else:
            once = run(instruction.reference("body"))
            times = loops.trip_count(self.walk.module, self.comp, instruction)
            if times is None:
                times = self.walk.passes
                total.dynamic[instruction.name] = (1.0, once)
            total.add(once, times)

    def _measure(self, instruction, kind, comp) -> Collective:
        return collectives.measure(self.walk.network, comp, instruction, kind)

    def _traffic(self, found: Collective) -> Traffic:
        traffic = self.total.traffic.setdefault((found.kind, found.axes), Traffic())
        one = Traffic(1.0, found.payload, found.wire, found.seconds)
        traffic.add(one)
        self.total.link_seconds += found.seconds
        return traffic

    def _blocking(self, found: Collective, instruction: Instruction) -> None:
        self._traffic(found).exposed += found.seconds
        self._pass(found.seconds, instruction)

    def _launch(self, name: str, found: Collective, network: str = "links") -> None:
        self._fly(name, network, found.seconds, self._traffic(found))

    def _fly(self, name: str, network: str, seconds: float, traffic: Traffic) -> None:
        begin = max(self.total.seconds, self.free.get(network, 0.0))
        self.free[network] = begin + seconds
        self.flying[name] = (self.free[network], traffic)

    def _copy(self, name: str, direction: str, nbytes: int) -> None:
        """A copy to the host or from it, each way beside all else."""
        seconds = nbytes / self.walk.network.chip.host_bandwidth
        traffic = self.total.host.setdefault(direction, Traffic())
        traffic.add(Traffic(1.0, nbytes, nbytes, seconds))
        self.total.hbm_bytes += nbytes
        self._fly(name, direction, seconds, traffic)

    def _exchange(self, instruction: Instruction) -> None:
        """A transfer between slices: it begins when sent, and recv waits for it."""
        key = re.search(r'_rendezvous="([^"]*)"', instruction.attributes)
        found = collectives.between_slices(self.walk.network, self.comp, instruction)
        if key is None or found is None:
            return
        if instruction.opcode == "send":
            self._launch(key[1], found, "slices")
        self.rendezvous[instruction.name] = key[1]

    def _land(self, names: tuple[str, ...]) -> None:
        for name in names:
            name = self.rendezvous.get(name, name)
            self._wait(self.flying.pop(name, None))

    def _wait(self, flight: tuple[float, Traffic | None] | None) -> None:
        if flight is None or flight[0] <= self.total.seconds:
            return
        end, traffic = flight
        waited = end - self.total.seconds
        if traffic is not None:
            traffic.exposed += waited
        else:  # Copies by another core.
            self.total.memory_seconds += waited
        self.total.seconds = end

    def _pass(self, seconds: float, instruction: Instruction) -> None:
        name = scope(instruction.op_name)
        self.total.scopes[name] = self.total.scopes.get(name, 0.0) + seconds
        self.total.seconds += seconds

    def _start(self, instruction: Instruction) -> None:
        kind = collectives.base_kind(instruction.opcode)
        if copy := host_copies.copied(instruction):
            self._copy(instruction.name, *copy)
        elif kind:
            self._launch(instruction.name, self._measure(instruction, kind, self.comp))
        elif instruction.opcode == "async-start":
            if instruction.operands:  # Else they come with its update.
                self._offload(instruction)
        else:  # A copy or slice between HBM and VMEM, prefetched.
            sizes = [shape.padded_bytes for shape in instruction.shapes[:2]]
            self.total.hbm_bytes += min(sizes)

    def _update(self, instruction: Instruction) -> None:
        """What is in flight goes on by this name, or takes off with its operands."""
        begun = self.comp.by_name[instruction.operands[0]]
        if begun.opcode == "async-start" and not begun.operands:
            self._offload(instruction, begun.reference("calls"))
        else:
            flight = self.flying.pop(begun.name, (0.0, None))
            self.flying[instruction.name] = flight

    def _offload(self, instruction: Instruction, name: str | None = None) -> None:
        """Another core's work: a collective, or copies and gathers."""
        name = name or instruction.reference("calls")
        comp = self.walk.module.computations[name]
        found = self._collective(comp)
        if found is not None:
            self._launch(instruction.name, found)
            return
        moved = sum(
            self.walk.meter.hbm_bytes(comp, inner)
            for inner in comp.instructions
            if inner.opcode not in _FREE
        )
        self.total.hbm_bytes += moved
        end = self.total.seconds + moved / self.walk.network.chip.hbm_bandwidth
        self.flying[instruction.name] = (end, None)

    def _collective(self, comp: Computation) -> Collective | None:
        """The one in a computation, or in what its custom calls wrap."""
        for inner in comp.instructions:
            kind = collectives.base_kind(inner.opcode)
            if kind:
                return self._measure(inner, kind, comp)
            wrapped = re.search(r"called_computations=\{%([^,}]+)", inner.attributes)
            if wrapped:
                return self._collective(self.walk.module.computations[wrapped[1]])
        return None

    def _fusion(self, instruction: Instruction) -> None:
        name = instruction.reference("calls")
        comp = self.walk.module.computations[name]
        markers = " ".join(
            i.attributes for i in comp.instructions if i.opcode == "custom-call"
        )
        inner = next(
            (i for i in comp.instructions if collectives.base_kind(i.opcode)), None
        )
        if "AsyncCollectiveStart" in markers and inner is not None:
            self._launch(instruction.name, self._fused(instruction, inner, comp))
            self.last_fused = self.flying[instruction.name]
        elif "AsyncCollective" in markers:
            self._land_fused(instruction)
        elif inner is not None and not name.startswith("async_collective_fusion"):
            self._blocking(self._fused(instruction, inner, comp), instruction)
        self._compute(instruction)

    def _fused(self, fusion, inner, comp) -> Collective:
        kind = collectives.base_kind(inner.opcode)
        if kind == "all-reduce" and collectives.reduce_scatter(fusion, inner):
            kind = "reduce-scatter"
        return self._measure(inner, kind, comp)

    def _land_fused(self, instruction: Instruction) -> None:
        for name in instruction.operands:
            source = self.comp.by_name.get(name)
            if source is not None and source.opcode == "get-tuple-element":
                name = source.operands[0]
            if name in self.flying:
                self._land((name,))
                return
        self._wait(self.last_fused)

    def _kernels(
        self, instruction: Instruction
    ) -> list[tuple[Computation, Instruction]]:
        """The kernel that this is, or those that a collective is fused with."""
        if instruction.opcode == "custom-call":
            return [(self.comp, instruction)]
        if instruction.opcode != "fusion":
            return []
        comp = self.walk.module.computations[instruction.reference("calls")]
        return [(comp, i) for i in comp.instructions if kernels.is_kernel(i)]

    def _compute(self, instruction: Instruction) -> None:
        chip, total = self.walk.network.chip, self.total
        moved = self.walk.meter.hbm_bytes(self.comp, instruction)
        visited = kernels.visited_share(instruction, self.walk.fill)
        flops = visited * self.walk.meter.flops(self.comp, instruction)
        for comp, kernel in self._kernels(instruction):
            call = kernels.kernel_work(comp, kernel, moved, self.walk.fill)
            flops, moved = flops + call.flops, call.hbm_bytes
            total.kernel_flops += call.flops
            if not call.known:
                total.unknown.add(call.kind)
        mxu, memory = flops / chip.flops, moved / chip.hbm_bandwidth
        product = mxu
        # Of products that skip groups the compiler's estimate counts every group.
        if instruction.matmul_cycles is not None and chip.clock and visited == 1.0:
            product = max(mxu, instruction.matmul_cycles / chip.clock)
        total.flops += flops
        total.hbm_bytes += moved
        total.mxu_seconds += mxu
        if product > memory:
            total.matmul_seconds += product
        else:
            total.memory_seconds += memory
        self._pass(max(product, memory), instruction)


def _branches(instruction: Instruction) -> Iterator[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        yield from re.findall(r"%([^\s,{}]+)", listed[1])
        return
    for key in ("true_computation", "false_computation"):
        yield instruction.reference(key)
