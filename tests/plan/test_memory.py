"""Memory by class: texts written by hand, and compiled steps."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.plan import hlo, memory, report
from moe_jax.plan.memory import WeightShapes

MODULE = r"""
%body (t: (f32[], f32[64,32])) -> (f32[], f32[64,32]) {
  %t = (f32[], f32[64,32]) parameter(0)
  %i = f32[] get-tuple-element(%t), index=0
  %carried = f32[64,32] get-tuple-element(%t), index=1
  %later = f32[64,32] add(%carried, %carried), metadata={op_name="jit(f)/jvp(m)/while/body/shard_map/experts/add"}
  ROOT %r = (f32[], f32[64,32]) tuple(%i, %later)
}

%condition (c: (f32[], f32[64,32])) -> pred[] {
  %c = (f32[], f32[64,32]) parameter(0)
  ROOT %p = pred[] custom-call(%c)
}

ENTRY %main (w: f32[16,8]) -> f32[16,8] {
  %w = f32[16,8] parameter(0), metadata={op_name="state.params[\'layer\'][\'w\']"}
  %m = f32[16,8] parameter(1), metadata={op_name="state.opt_state[0].mu[\'layer\'][\'w\']"}
  %tokens = s32[4] parameter(2), metadata={op_name="batch.tokens"}
  %ema = f32[16,8] parameter(3), metadata={op_name="state.ema[\'layer\'][\'w\']"}
  %step = s32[] parameter(4), metadata={op_name="state.step"}
  %cast = bf16[16,8] convert(%w)
  %turned = bf16[8,16] copy(%cast)
  %rows = f32[64,32] dot(%w, %m), metadata={op_name="jit(f)/jvp(m)/attention/dot_general"}
  %sent = f32[128,32] add(%rows, %rows), metadata={op_name="jit(f)/jvp(m)/dispatch/gather"}
  %dw = f32[16,8] dot(%w, %m), metadata={op_name="jit(f)/transpose(jvp(m))/attention/dot_general"}
  %norm = f32[] multiply(%w, %w), metadata={op_name="jit(f)/mul"}
  %zero = f32[] constant(0)
  %init = (f32[], f32[64,32]) tuple(%zero, %rows)
  %loop = (f32[], f32[64,32]) while(%init), condition=%condition, body=%body, metadata={op_name="jit(f)/jvp(m)/while"}
  ROOT %out = f32[16,8] add(%dw, %w)
}
"""  # noqa: E501
ARGUMENTS = """BufferAssignment:
allocation 0: size 512, page 0, parameter 0, shape |f32[16,8]| at ShapeIndex {}:
 value: <1 w @0> (size=512,offset=0): f32[16,8]{1,0}
allocation 1: size 600, page 0, parameter 1, shape |f32[16,8]| at ShapeIndex {}:
 value: <2 m @0> (size=512,offset=0): f32[16,8]{1,0}
allocation 2: size 16, page 0, parameter 2, shape |s32[4]| at ShapeIndex {}:
 value: <3 tokens @0> (size=16,offset=0): s32[4]{0}
allocation 3: size 512, page 0, parameter 3, shape |f32[16,8]| at ShapeIndex {}:
 value: <4 ema @0> (size=512,offset=0): f32[16,8]{1,0}
allocation 4: size 4, page 0, parameter 4, shape |s32[]| at ShapeIndex {}:
 value: <5 step @0> (size=4,offset=0): s32[]
allocation 5: size 4, page 0, thread-local:
 value: <6 q @0> (size=4,offset=0): f32[]
allocation 6: size 90000, color 1, page 0, preallocated-temp:
 value: <7 fast @1> (size=90000,offset=0): f32[22500]{0:S(1)}
"""
HEAP = "allocation 7: size 40000, page 0, preallocated-temp:\n"
PARAMETERS, OPTIMIZER, REST = 512 + 512, 600, 16 + 4


@pytest.fixture(scope="module")
def mesh():
    names = ("data", "fsdp", "expert")
    return jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)


def weights(mesh, shape, spec, name="layer"):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return {name: {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}}


@pytest.fixture
def at_peak(mesh):
    """Memory of lines (name, bytes, offset, begin, end, type) of the heap."""

    def run(*lines):
        values, ranges = [], []
        for number, line in enumerate(lines):
            name, size, offset, begin, end, shape = line
            plain, _, index = name.removesuffix(" (phi)").partition("{")
            ranges.append(f"    {plain}{{{index or '}'}:{begin}-{end}")
            values.append(
                f" value: <{10 + number} {name} @0> "
                f"(size={size},offset={offset}): {shape}"
            )
        buffers = ARGUMENTS + HEAP + "\n".join(values)
        live = "HloLiveRange (max 9):\n  BufferLiveRange:\n" + "\n".join(ranges)
        shapes = WeightShapes(weights(mesh, (16, 8), ("fsdp",)), "segment_")
        return memory.at_peak(hlo.parse(MODULE), buffers, live, shapes)

    return run


def test_the_moment_of_the_largest_need_counts(at_peak):
    found = at_peak(
        ("rows", 8192, 0, 1, 5, "f32[64,32]{1,0}"),
        ("sent", 16384, 8192, 5, 8, "f32[128,32]{1,0}"),
        ("dw", 512, 0, 7, 9, "f32[16,8]{1,0}"),
        ("norm", 4, 24576, 2, 3, "f32[]"),
    )
    assert found.classes == dict.fromkeys(memory.CLASSES, 0) | {
        "parameters": PARAMETERS,
        "optimizer": OPTIMIZER,
        "dispatch": 16384,
        "activations": 8192,  # Of 5 to 5, both ends counted; dw came later.
        "other": REST,
    }
    assert found.peak_bytes == PARAMETERS + OPTIMIZER + REST + 16384 + 8192
    assert [b.name for b in found.largest] == ["sent", "rows"]
    assert found.largest[1].source == "jit(f)/jvp(m)/attention/dot_general"


def test_gaps_of_the_heap_are_allocated_too(at_peak):
    found = at_peak(("rows", 8192, 0, 1, 5, "f32[64,32]{1,0}"))
    arguments = PARAMETERS + OPTIMIZER + REST
    assert (found.peak_bytes, found.allocated_bytes) == (
        arguments + 8192,
        arguments + 40000,
    )


@pytest.mark.parametrize(
    "name, shape, kind",
    [
        ("rows", "f32[64,32]{1,0}", "activations"),
        ("sent", "f32[128,32]{1,0}", "dispatch"),
        ("dw", "f32[16,8]{1,0}", "gradients"),
        ("dw", "f32[8,8]{1,0}", "gradients"),  # A shard of it.
        ("dw", "f32[4,8]{1,0}", "activations"),  # No split over fsdp gives this.
        ("cast", "bf16[16,8]{1,0}", "weights"),
        ("turned", "bf16[8,16]{1,0}", "weights"),
        ("norm", "f32[]", "other"),
    ],
)
def test_class_of_a_temporary(at_peak, name, shape, kind):
    before = at_peak(("norm", 4, 9000, 1, 5, "f32[]"))
    found = at_peak((name, 1024, 0, 1, 5, shape))
    assert found.classes[kind] - before.classes[kind] in (1024, 1020)
    assert [b.kind for b in found.largest] == [kind]


def test_a_loop_s_state_is_of_the_class_of_its_maker(at_peak):
    found = at_peak(
        ("loop{1} (phi)", 8192, 0, 3, 9, "f32[64,32]{1,0}"),
        ("t{1} (phi)", 8192, 8192, 3, 9, "f32[64,32]{1,0}"),
    )
    assert found.classes["dispatch"] == 2 * 8192
    assert found.largest[0].source.endswith("experts/add")


def test_values_of_one_place_are_one_buffer(at_peak):
    found = at_peak(
        ("rows", 8192, 0, 1, 6, "f32[64,32]{1,0}"),
        ("loop{1} (phi)", 8192, 0, 5, 9, "f32[64,32]{1,0}"),
        ("norm", 4, 0, 6, 6, "f32[]"),
        ("sent", 4096, 8192, 8, 9, "f32[32,32]{1,0}"),
    )
    # At 8; at 5 and 6 there is but one value of 8192 bytes.
    assert found.peak_bytes == PARAMETERS + OPTIMIZER + REST + 8192 + 4096
    assert [b.name for b in found.largest] == ["loop", "sent"]


def test_shapes_that_sharding_gives_a_weight(mesh):
    split = (None, ("fsdp", "expert"), None)
    params = weights(mesh, (3, 16, 5), split, "segment_0")
    shapes = WeightShapes(params, "segment_", activations=[(16, 5)])
    for dims in [(3, 16, 5), (3, 8, 5), (3, 4, 5), (8, 5), (1, 4, 5), (5, 1, 8)]:
        assert shapes.has(dims), dims
    # Layers are not split; nor is the last dimension; an activation has that shape.
    for dims in [(2, 16, 5), (3, 2, 5), (16, 5), (15,), (5,)]:
        assert not shapes.has(dims), dims
    other = WeightShapes(weights(mesh, (3, 16, 5), split, "outer"), "segment_")
    assert not other.has((8, 5))


def shard_bytes(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def arguments(compiled, kind):
    """Bytes of a class without its temporary copies."""
    found = report.from_program(compiled.parts.config, compiled).memory
    return found.classes[kind] - sum(b.nbytes for b in found.largest if b.kind == kind)


def test_arguments_of_a_host_step_are_its_shards(host_step):
    state = host_step.parts.abstract
    assert arguments(host_step, "parameters") == shard_bytes(state.params)
    assert arguments(host_step, "optimizer") == shard_bytes(state.opt_state)


def test_arguments_of_a_tpu_step_are_its_padded_shards(tpu_step):
    state = tpu_step.parts.abstract
    scalars = sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state.opt_state))
    weights = arguments(tpu_step, "parameters")
    # Two moments of each parameter, and counts of steps.
    assert arguments(tpu_step, "optimizer") == 2 * weights + 512 * scalars
    # 264 x 8 is in memory as 8 x 384; no weight here is padded more than 16 times.
    assert shard_bytes(state.params) < weights < 16 * shard_bytes(state.params)


@pytest.mark.parametrize("step", ["host_step", "tpu_step"])
def test_classes_of_a_compiled_step_add_up(request, step):
    compiled = request.getfixturevalue(step)
    found = report.from_program(compiled.parts.config, compiled).memory
    assert sum(found.classes.values()) == found.peak_bytes <= found.allocated_bytes
    beside = sum(b.nbytes for b in found.largest)
    kinds = ("gradients", "weights", "dispatch", "activations")
    assert beside >= sum(found.classes[kind] for kind in kinds) > 0


def test_allocated_is_what_the_host_s_compiler_counts(host_step):
    found = report.from_program(host_step.parts.config, host_step).memory
    # It counts scalars and the table of results, too.
    assert found.allocated_bytes <= host_step.peak_bytes < 1.01 * found.allocated_bytes


def test_live_values_fill_the_host_s_heap(host_step):
    """What lives at the peak neither overlaps nor leaves much of the heap."""
    found = report.from_program(host_step.parts.config, host_step).memory
    heap = int(re.search(r"size (\d+), preallocated-temp", host_step.buffers)[1])
    assert 0.9 * heap < sum(b.nbytes for b in found.largest) <= heap
