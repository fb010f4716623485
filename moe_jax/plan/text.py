"""A plan as text for people."""

from collections.abc import Iterator

from moe_jax.plan.report import Plan

_LARGEST = 5


def lines(plan: Plan) -> Iterator[str]:
    """The whole report, line by line. GB are 10^9 bytes, all figures per device."""
    mesh = " ".join(f"{axis}={n}" for axis, n in plan.mesh.items() if n > 1)
    times = f"{plan.slices} x " if plan.slices > 1 else ""
    yield f"{times}{plan.topology}: {plan.num_chips} chips, mesh {mesh or 'of one'}"
    yield f"compiled in {plan.compile_seconds:.0f} s by {plan.compiler}"
    yield ""
    yield from _memory(plan)
    yield ""
    if plan.step is None:
        yield (
            f"model FLOPs {plan.model_flops:.4g} per device and step. Time and "
            "collectives need a TPU topology: --topology=v5e:4x4"
        )
        return
    yield from _work(plan)
    yield ""
    yield from _collectives(plan)
    yield from _host(plan)
    yield ""
    yield from _time(plan)


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much, in one line."""
    need = plan.memory.allocated_bytes / 1e9
    said = f"{plan.memory.peak_bytes / 1e9:.3f} GB at the peak, {need:.3f} allocated"
    if plan.capacity_bytes is None:
        return f"{said}, by the host's compiler: a stand-in for the real one"
    room = plan.capacity_bytes / 1e9
    if plan.fits:
        return f"{said} of {room:.2f}: fits, {room - need:.2f} GB to spare"
    if need <= room:
        return f"{said} of {room:.2f}: DOES NOT FIT, says the compiler"
    return f"{said} of {room:.2f}: DOES NOT FIT, {need - room:.2f} GB too much"


def _memory(plan: Plan) -> Iterator[str]:
    yield f"memory  {verdict(plan)}"
    for kind, nbytes in plan.memory.classes.items():
        share = nbytes / plan.memory.peak_bytes
        yield f"  {kind:<12} {nbytes / 1e9:9.3f} GB  {share:6.1%}"
    if plan.host_bytes:
        yield f"  on the host  {plan.host_bytes / 1e9:9.3f} GB, not counted above"
    yield "  largest buffers beside the arguments:"
    for buffer in plan.memory.largest[:_LARGEST]:
        yield (
            f"    {buffer.nbytes / 1e9:9.3f} GB  {buffer.kind:<11} "
            f"{buffer.shape:<24} {_short(buffer.source)}"
        )


def _short(source: str, most: int = 60) -> str:
    source = source.removeprefix("jit(train_step)/")
    return source if len(source) <= most else "..." + source[3 - most :]


def _work(plan: Plan) -> Iterator[str]:
    step, seconds = plan.step, plan.step.seconds
    waste = step.executed_flops / plan.model_flops
    yield "work of a step"
    yield f"  model FLOPs    {plan.model_flops:12.4g}"
    yield f"  executed FLOPs {step.executed_flops:12.4g}  {waste:.2f} x model"
    yield f"  HBM traffic    {step.hbm_bytes / 1e9:9.2f} GB"
    yield f"  sent to others {step.wire_bytes / 1e9:9.3f} GB"
    for kernel in step.unknown_kernels:
        yield f"  WARNING: the FLOPs of kernel {kernel!r} are not counted"
    for loop in step.loops:
        yield (
            f"  a loop depends on data: {_short(loop.where, 40)}, met {loop.met} "
            f"times; assumed {loop.assumed:g} passes"
        )
        yield (
            f"    one pass more takes {loop.seconds * 1e3:.3g} ms, "
            f"{loop.seconds / seconds:.1%} of the step"
        )


def _collectives(plan: Plan) -> Iterator[str]:
    yield (
        f"{'collectives of a step':<42}{'count':>7}{'payload':>11}{'sent':>11}"
        f"{'time':>11}{'exposed':>11}"
    )
    for row in plan.step.collectives:
        name = f"{row.kind} over {', '.join(row.axes) or 'one device'}"
        yield (
            f"  {name:<40}{row.count:>7}{row.payload_bytes / 1e6:>8.1f} MB"
            f"{row.wire_bytes / 1e6:>8.1f} MB{row.seconds * 1e3:>8.2f} ms"
            f"{row.exposed_seconds * 1e3:>8.2f} ms"
        )


def _host(plan: Plan) -> Iterator[str]:
    for row in plan.step.host:
        yield (
            f"  copies {row.direction:<33}{row.count:>7}{row.nbytes / 1e6:>8.1f} MB"
            f"{'':>11}{row.seconds * 1e3:>8.2f} ms{row.exposed_seconds * 1e3:>8.2f} ms"
        )


def _time(plan: Plan) -> Iterator[str]:
    step = plan.step
    yield (
        f"time of a step, modelled, not measured   {step.seconds * 1e3:.2f} ms, "
        f"bound by {step.bound}"
    )
    for name, seconds in (
        ("matrix products", step.matmul_seconds),
        ("HBM bandwidth", step.memory_seconds),
        ("exposed collectives", step.exposed_seconds),
        *([("waiting for the host", step.host_seconds)] if step.host else []),
    ):
        yield f"  {name:<20} {seconds * 1e3:9.2f} ms  {seconds / step.seconds:6.1%}"
    shares = [
        f"{name} {seconds / step.seconds:.0%}"
        for name, seconds in step.scopes.items()
        if seconds >= 0.01 * step.seconds
    ]
    yield f"  by part of the model: {', '.join(shares)}"
    yield (
        f"  MFU {plan.mfu:.1%}; {plan.tokens_per_chip_hour / 1e6:.2f} million "
        f"{plan.token_name} per chip-hour"
    )
