"""Copies to the host and back, told from copies within a device."""

import dataclasses

import pytest

from moe_jax.plan import hlo, host_copies, schedule
from moe_jax.plan.collectives import Network
from moe_jax.plan.host_copies import FROM_HOST, TO_HOST

BIG, AWAY = "f32[4,16,512]{2,1,0:T(8,128)S(5)}", "f32[100]{0:S(5)}"
ROW, SCALARS = "f32[1,16,512]{2,1,0:T(8,128)}", "s32[], s32[], s32[]"
BYTES = 16 * 512 * 4


@pytest.mark.parametrize(
    ("line", "want"),
    [
        (f"(f32[100]{{0}}, {AWAY}, u32[]) copy-start(%a)", (FROM_HOST, 400)),
        (f"({AWAY}, f32[100]{{0:S(1)}}, u32[]) copy-start(%a)", (TO_HOST, 400)),
        ("(f32[100]{0}, f32[100]{0:S(1)}, u32[]) copy-start(%a)", None),
        (
            f"(({BIG}, {SCALARS}), {ROW}, u32[]) dynamic-slice-start(%a)",
            (FROM_HOST, BYTES),
        ),
        (
            f"(({BIG}, {ROW}, {SCALARS}), {BIG}, u32[]) async-start(%a, %b), calls=%c",
            (TO_HOST, BYTES),
        ),
        (f"(({BIG}, {SCALARS}), {ROW}, u32[]) async-start(%a)", (FROM_HOST, BYTES)),
    ],
)
def test_direction_and_bytes(line, want):
    text = f"HloModule m\n\nENTRY %main () -> f32[] {{\n  %start = {line}\n}}\n"
    (comp,) = hlo.parse(text).computations.values()
    assert host_copies.copied(comp.by_name["start"]) == want


def test_each_way_beside_all_else(main_of, toy):
    """400 bytes at 10 bytes/s; a product of 16 s stands between start and done."""
    chip = dataclasses.replace(toy, host_bandwidth=10.0)
    module, _ = main_of(
        f"""
%a = f32[4,8]{{1,0:S(1)}} parameter(0)
%b = f32[8,16]{{1,0:S(1)}} parameter(1)
%x = {AWAY} parameter(2)
%y = f32[100]{{0:S(1)}} parameter(3)
%in = (f32[100]{{0:S(1)}}, {AWAY}, u32[]) copy-start(%x)
%out = ({AWAY}, f32[100]{{0:S(1)}}, u32[]) copy-start(%y)
%dot = f32[4,16]{{1,0:S(1)}} dot(%a, %b), lhs_contracting_dims={{1}}
%here = f32[100]{{0:S(1)}} copy-done(%in)
%there = {AWAY} copy-done(%out)
ROOT %end = () tuple()""",
        "",
    )
    network = Network({"data": 1, "expert": 2}, (0, 0), chip, (0, 1))
    total = schedule.Walk(module, network).run()
    assert total.seconds == 40 and total.traffic == {}
    assert total.host[FROM_HOST].exposed == 40 - 16 and total.host[TO_HOST].exposed == 0
    for direction in (TO_HOST, FROM_HOST):
        one = total.host[direction]
        assert (one.count, one.payload, one.seconds) == (1, 400, 40)


def test_bytes_that_a_program_keeps_there():
    buffers = """BufferAssignment:
allocation 0: size 800, color 5, page 0, parameter 3, shape |f32[200]|:
 value: <1 p @5> (size=800,offset=0): f32[200]{0:S(5)}
allocation 1: size 400, page 0, parameter 1, shape |f32[100]|:
allocation 2: size 512, color 6, page 0, thread-local:
allocation 3: size 96, color 5, page 0, preallocated-temp:
"""
    assert host_copies.host_bytes(buffers) == 896
