"""Shows that a config gives the same numbers on every mesh, on fake CPU devices.

Example:
  moe-jax check --config=configs/quickstart.py --mesh=expert=8 --mesh=expert=4,data=2

One training step of the config, on random packed text, on one device and on each
mesh: loss, every gradient, the gradient norm, balance losses, router state, expert
counts, initial parameters, and parameters after the step. In float64 all must agree
to 1e-8 (relative; counts exactly). In float32 the one-device run's routing is
replayed, and all must agree to 1e-5. Exits with 1 where something differs.
"""

import dataclasses
import math

from absl import flags

from moe_jax.cli import common

FLAGS = flags.FLAGS
_DEFAULT_MESHES = ("expert=4,data=2", "expert=2,fsdp=2,tensor=2")


def define_flags() -> None:
    common.define_config()
    flags.DEFINE_multi_string("mesh", list(_DEFAULT_MESHES), "A mesh; may be repeated.")
    flags.DEFINE_bool("shrink", False, "Check a smaller model of the same kind.")
    common.define_json()


def main() -> int:
    config = common.load_config()
    common.check_json()
    meshes = {text: common.parse_mesh(text) for text in FLAGS.mesh}
    import jax

    from moe_jax.check import run

    jax.config.update("jax_platforms", "cpu")
    wanted = max(mesh.fixed_devices() for mesh in meshes.values())
    jax.config.update("jax_num_cpu_devices", wanted)
    results = run.check(run.prepare(config, meshes, FLAGS.shrink), meshes)
    for result in results:
        print("\n".join(_lines(result)), flush=True)
    common.write_json([_row(result) for result in results])
    failed = sum(not result.passed for result in results)
    checked = f"{len(meshes)} mesh{'es' * (len(meshes) > 1)} in float32 and float64"
    print(f"FAILED: {failed} of {len(results)}" if failed else f"passed: {checked}")
    return 1 if failed else 0


def _lines(result):
    worst = result.worst
    verdict = "ok  " if result.passed else "FAIL"
    yield (
        f"{verdict} {result.mesh:<28} {result.dtype}  {len(result.differences)} "
        f"quantities, worst {worst.error:.1e} in {worst.name}"
    )
    if any(result.dropped):
        yield (
            f"     assignments dropped: {result.dropped[0]} on the mesh, "
            f"{result.dropped[1]} on one device. What is dropped depends on the "
            "layout: raise the capacity_factor, or take the Exact dispatch"
        )
    if sum(result.near_ties):
        yield (
            f"     near-ties in the top-k: {sum(result.near_ties)} tokens "
            f"(per layer {result.near_ties}); without replay they may be routed "
            "otherwise"
        )
    if not result.passed:
        wrong = [d for d in result.differences if not d.passed]
        key = lambda d: -math.inf if math.isnan(d.error) else -d.error
        for d in sorted(wrong, key=key)[:8]:
            yield f"     {d.error:.2e} (allowed {d.allowed:.0e})  {d.name}"


def _row(result):
    row = dataclasses.asdict(result)
    row["passed"] = result.passed
    row["worst"] = dataclasses.asdict(result.worst)
    return row


if __name__ == "__main__":
    common.run(main, define_flags)
