"""The clock of the walk: schedules written by hand on a chip of round figures.

The chip does 64 FLOP/s, moves 100 bytes/s of HBM and sends 10 bytes/s. Arrays in
memory space 1 cost no HBM traffic.
"""

import pytest
from schedules import DOT, GATHER, GATHERED, KEY, START


def test_work_that_hides_a_collective_in_part(walk):
    total = walk(f"""
%start = {START}
%dot = {DOT}
%done = {GATHERED} all-gather-done(%start)
""")
    assert total.flops == 1024
    assert (total.seconds, total.matmul_seconds, total.mxu_seconds) == (20, 16, 16)
    one = total.traffic[KEY]
    assert (one.count, one.payload, one.wire) == (1, 400, 200)
    assert (one.seconds, one.exposed, total.exposed_seconds) == (20, 4, 4)
    assert total.link_seconds == 20


def test_work_that_hides_a_collective_whole(walk):
    total = walk(f"""
%start = {START}
%dot = {DOT}
%dot.2 = {DOT}
%done = {GATHERED} all-gather-done(%start)
""")
    assert (total.seconds, total.exposed_seconds) == (32, 0)
    assert total.traffic[KEY].seconds == 20


def test_work_after_the_done_hides_nothing(walk):
    total = walk(f"""
%start = {START}
%done = {GATHERED} all-gather-done(%start)
%dot = {DOT}
""")
    assert (total.seconds, total.exposed_seconds) == (36, 20)


def test_a_synchronous_collective_is_all_exposed(walk):
    total = walk(f"""
%dot = {DOT}
%all = {GATHERED} all-gather(%x), {GATHER}
""")
    assert (total.seconds, total.exposed_seconds) == (36, 20)


def test_collectives_wait_for_one_another(walk):
    total = walk(f"""
%start = {START}
%start.2 = {START}
%dot = {DOT}
%done = {GATHERED} all-gather-done(%start)
%done.2 = {GATHERED} all-gather-done(%start.2)
""")
    # The first ends at 20, the second at 40.
    assert (total.seconds, total.exposed_seconds, total.link_seconds) == (40, 24, 40)


def test_an_instruction_takes_the_longest_of_its_bounds(walk):
    hbm = "%h = f32[8,16] parameter(3)"
    total = walk(f"{hbm}\n%dot = {DOT.replace('%b', '%h')}")
    # 512 bytes read: 5.12 s, less than 16 s of products.
    assert (total.hbm_bytes, total.seconds, total.memory_seconds) == (512, 16, 0)
    big = "%h = f32[1000] parameter(3)"
    total = walk(f"{big}\n%sum = f32[1000] add(%h, %h)")
    assert (total.hbm_bytes, total.seconds) == (12000, 120)
    assert (total.memory_seconds, total.matmul_seconds) == (120, 0)


@pytest.mark.parametrize("cycles, seconds", [(1500, 30), (50, 16), (-1, 16)])
def test_the_compiler_s_cycles_may_make_a_product_longer(walk, cycles, seconds):
    config = '{"estimated_cycles":"%d","cost_model_type":"COST_MODEL_TYPE_CLASSIC"}'
    total = walk(f"%dot = {DOT}, backend_config={config % cycles}")
    assert (total.seconds, total.mxu_seconds) == (seconds, 16)


LOOP = f"""
%less (s: (s32[], f32[4,8])) -> pred[] {{
  %s = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(5)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}

%body (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %t = (s32[], f32[4,8]) parameter(0)
  %j = s32[]{{:S(1)}} get-tuple-element(%t), index=0
  %a = f32[4,8]{{1,0:S(1)}} get-tuple-element(%t), index=1
  %b = f32[8,16]{{1,0:S(1)}} constant({{...}})
  %x = f32[50]{{0:S(1)}} constant({{...}})
  %one = s32[]{{:S(1)}} constant(1)
  %start = {START}
  %d = {DOT}
  %done = {GATHERED} all-gather-done(%start)
  %next = s32[]{{:S(1)}} add(%j, %one)
  ROOT %new = (s32[], f32[4,8]) tuple(%next, %a)
}}
"""
WHILE = """
%zero = s32[] FIRST
%init = (s32[], f32[4,8]) tuple(%zero, %a)
%loop = (s32[], f32[4,8]) while(%init), condition=%less, body=%body
"""


def test_a_loop_multiplies_everything(walk):
    total = walk(WHILE.replace("FIRST", "constant(0)"), LOOP)
    assert (total.flops, total.seconds, total.exposed_seconds) == (5120, 100, 20)
    one = total.traffic[KEY]
    assert (one.count, one.payload, one.wire, one.seconds) == (5, 2000, 1000, 100)
    assert total.scopes == {"other": 80}
    assert not total.dynamic


@pytest.mark.parametrize("passes", [0.0, 2.5])
def test_a_loop_that_depends_on_data_runs_as_often_as_assumed(walk, passes):
    total = walk(WHILE.replace("FIRST", "parameter(3)"), LOOP, passes=passes)
    assert (total.flops, total.seconds) == (1024 * passes, 20 * passes)
    ((met, once),) = [total.dynamic["loop"]]
    assert (met, once.seconds, once.flops) == (1, 20, 1024)


OUTER = """
%less.2 (s.2: (s32[], f32[4,8], s32[])) -> pred[] {
  %s.2 = (s32[], f32[4,8], s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %n.2 = s32[] constant(3)
  ROOT %c.2 = pred[] compare(%i.2, %n.2), direction=LT
}

%body.2 (t.2: (s32[], f32[4,8], s32[])) -> (s32[], f32[4,8], s32[]) {
  %t.2 = (s32[], f32[4,8], s32[]) parameter(0)
  %j.2 = s32[]{:S(1)} get-tuple-element(%t.2), index=0
  %a.2 = f32[4,8] get-tuple-element(%t.2), index=1
  %k.2 = s32[] get-tuple-element(%t.2), index=2
  %one.2 = s32[]{:S(1)} constant(1)
  %init.2 = (s32[], f32[4,8]) tuple(%k.2, %a.2)
  %inner = (s32[], f32[4,8]) while(%init.2), condition=%less, body=%body
  %next.2 = s32[]{:S(1)} add(%j.2, %one.2)
  ROOT %new.2 = (s32[], f32[4,8], s32[]) tuple(%next.2, %a.2, %k.2)
}
"""


def test_a_loop_of_data_within_a_counted_one(walk):
    lines = """
%zero = s32[] constant(0)
%given = s32[] parameter(3)
%init = (s32[], f32[4,8], s32[]) tuple(%zero, %a, %given)
%outer = (s32[], f32[4,8], s32[]) while(%init), condition=%less.2, body=%body.2
"""
    total = walk(lines, LOOP + OUTER, passes=2)
    assert (total.flops, total.seconds) == (3 * 2 * 1024, 3 * 2 * 20)
    met, once = total.dynamic["inner"]
    assert (met, once.seconds) == (3, 20)


BRANCHES = f"""
%cheap (p: f32[4,8]) -> f32[] {{
  %p = f32[4,8] parameter(0)
  ROOT %none = f32[] constant(0)
}}

%dear (q: f32[4,8]) -> f32[4,16] {{
  %a = f32[4,8]{{1,0:S(1)}} parameter(0)
  %b = f32[8,16]{{1,0:S(1)}} constant({{...}})
  ROOT %d = {DOT}
}}
"""


@pytest.mark.parametrize("one, two", [("cheap", "dear"), ("dear", "cheap")])
@pytest.mark.parametrize(
    "form",
    ["branch_computations={%1, %2}", "true_computation=%1, false_computation=%2"],
)
def test_of_a_conditional_the_dearer_branch_counts(walk, form, one, two):
    branches = form.replace("1", one).replace("2", two)
    total = walk(f"%c = f32[] conditional(%x, %a, %a), {branches}", BRANCHES)
    assert (total.flops, total.seconds) == (1024, 16)


def test_a_call_counts_as_what_it_calls(walk):
    total = walk("%c = f32[4,16] call(%a), to_apply=%dear", BRANCHES)
    assert (total.flops, total.seconds) == (1024, 16)


def test_kernels_and_markers(walk):
    kernel = 'custom-call(%rows, %w), custom_call_target="tpu_custom_call"'
    total = walk(
        f"""
%rows = bf16[256,8] parameter(3)
%w = bf16[1,8,4] parameter(4)
%marker = f32[1000] custom-call(), custom_call_target="AllocateBuffer"
%gmm = bf16[256,4] {kernel}
%odd = bf16[256,4] {kernel}
""",
        fill=0.5,
    )
    # Half of the rows, one group: 128 * 8 * 4 products.
    assert total.flops == total.kernel_flops == 2 * 128 * 8 * 4
    assert total.unknown == {"odd"}


def test_a_kernel_in_a_fusion_counts(walk):
    """XLA may fuse one with the collective that it runs beside."""
    inside = """
%beside (p5: bf16[256,8], p6: bf16[1,8,4]) -> bf16[256,4] {
  %p5 = bf16[256,8] parameter(0)
  %p6 = bf16[1,8,4] parameter(1)
  ROOT %gmm = bf16[256,4] custom-call(%p5, %p6), custom_call_target="tpu_custom_call"
}
"""
    total = walk(
        """
%rows = bf16[256,8] parameter(3)
%w = bf16[1,8,4] parameter(4)
%fused = bf16[256,4] fusion(%rows, %w), kind=kCustom, calls=%beside
""",
        inside,
        fill=0.5,
    )
    assert total.flops == total.kernel_flops == 2 * 128 * 8 * 4


def test_seconds_by_scope(walk):
    total = walk(f"""
%dot = {DOT}, metadata={{op_name="jit(f)/attention/dot"}}
%dot.2 = {DOT}, metadata={{op_name="jit(f)/experts/dot"}}
%dot.3 = {DOT}, metadata={{op_name="jit(f)/experts/dot"}}
""")
    assert total.scopes == {"attention": 16, "experts": 32}
