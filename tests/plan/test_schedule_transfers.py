"""Collectives within other instructions, copies of other cores, sends to slices."""

import pytest
from schedules import DOT, GATHER, GATHERED, KEY, START

FUSED = f"""
%begin (p: f32[50]) -> (f32[50], f32[100]) {{
  %p = f32[50]{{0:S(1)}} parameter(0)
  %g = {GATHERED} all-gather(%p), {GATHER}
  ROOT %m = (f32[50]{{0:S(1)}}, {GATHERED}) custom-call(%p, %g), \
custom_call_target="AsyncCollectiveStart"
}}

%end (p2: f32[50], p3: f32[100]) -> f32[100] {{
  %p2 = f32[50]{{0:S(1)}} parameter(0)
  %p3 = {GATHERED} parameter(1)
  %g2 = {GATHERED} all-gather(%p2), {GATHER}
  ROOT %m2 = {GATHERED} custom-call(%p2, %p3, %g2), \
custom_call_target="AsyncCollectiveDone"
}}

%scatter (p4: f32[100]) -> f32[50] {{
  %p4 = f32[100]{{0:S(1)}} parameter(0)
  %r4 = f32[100]{{0:S(1)}} all-reduce(%p4), replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %half = f32[50]{{0:S(1)}} dynamic-slice(%r4), dynamic_slice_sizes={{50}}
}}
"""


def test_collective_begun_and_ended_in_fusions(walk):
    total = walk(
        f"""
%start = (f32[50]{{0:S(1)}}, {GATHERED}) fusion(%x), kind=kCustom, calls=%begin
%one = f32[50]{{0:S(1)}} get-tuple-element(%start), index=0
%two = {GATHERED} get-tuple-element(%start), index=1
%dot = {DOT}
%done = {GATHERED} fusion(%one, %two), kind=kCustom, calls=%end
""",
        FUSED,
    )
    assert total.traffic[KEY].count == 1
    assert (total.seconds, total.exposed_seconds) == (20, 4)


def test_reduce_scatter_in_a_fusion(walk):
    total = walk(
        """
%y = f32[100]{0:S(1)} parameter(3)
%part = f32[50]{0:S(1)} fusion(%y), kind=kCustom, calls=%scatter
""",
        FUSED,
    )
    one = total.traffic[("reduce-scatter", ("expert",))]
    assert (one.payload, one.wire, one.exposed) == (400, 200, 20)
    assert len(total.traffic) == 1


OFFLOADED = f"""
%gathering (p: f32[50]) -> f32[100] {{
  %p = f32[50]{{0:S(1)}} parameter(0)
  ROOT %g = {GATHERED} all-gather(%p), {GATHER}
}}

%copying (p2: f32[400]) -> f32[400] {{
  %p2 = f32[400] parameter(0)
  ROOT %copied = f32[400]{{0:S(1)}} copy(%p2)
}}
"""


@pytest.mark.parametrize("last", ["start", "update", "update.2"])
def test_collective_of_another_core(walk, last):
    total = walk(
        f"""
%start = ((f32[50]), {GATHERED}) async-start(%x), calls=%gathering
{"%update = () async-update(%start)" if last != "start" else ""}
{"%update.2 = () async-update(%update)" if last == "update.2" else ""}
%dot = {DOT}
%done = {GATHERED} async-done(%{last})
""",
        OFFLOADED,
    )
    assert (total.seconds, total.exposed_seconds) == (20, 4)


WRAPPED = f"""
%called (p3: f32[50]) -> f32[100] {{
  %p3 = f32[50]{{0:S(1)}} parameter(0)
  ROOT %g3 = {GATHERED} all-gather(%p3), {GATHER}
}}

%wrapping (p4: f32[50]) -> f32[100] {{
  %p4 = f32[50]{{0:S(1)}} parameter(0)
  ROOT %c = {GATHERED} custom-call(%p4), called_computations={{%called}}
}}
"""


def test_collective_that_starts_when_its_operands_come(walk):
    """And that a custom call wraps."""
    begun = "%start = ((), (), s32[1]) async-start(), calls=%wrapping"
    sent = f"%update = (f32[50], {GATHERED}) async-update(%start, %x)"
    done = f"%done = {GATHERED} async-done(%update)"
    total = walk(f"{begun}\n{sent}\n%dot = {DOT}\n{done}", WRAPPED)
    assert (total.seconds, total.exposed_seconds) == (20, 4)
    # Before its operands are there, nothing travels.
    total = walk(f"{begun}\n%dot = {DOT}\n{sent}\n{done}", WRAPPED)
    assert total.exposed_seconds == 20 and total.seconds == 36
    assert total.traffic[("all-gather", ("expert",))].count == 1


def test_copy_by_another_core_takes_its_time(walk):
    copy = "%start = ((f32[400]), f32[400]) async-start(%big), calls=%copying"
    done = "%done = f32[400] async-done(%start)"
    big = "%big = f32[400] parameter(3)"
    total = walk(f"{big}\n{copy}\n%dot = {DOT}\n{done}", OFFLOADED)
    # 1600 bytes read: 16 s, beside the product; no collective.
    assert (total.hbm_bytes, total.seconds, total.memory_seconds) == (1600, 16, 0)
    total = walk(f"{big}\n{copy}\n{done}", OFFLOADED)
    assert (total.seconds, total.memory_seconds, total.exposed_seconds) == (16, 16, 0)


def test_a_prefetch_counts_as_traffic(walk):
    total = walk("""
%big = f32[400] parameter(3)
%start = (f32[400]{0:S(1)}, f32[400], u32[]) copy-start(%big)
%done = f32[400]{0:S(1)} copy-done(%start)
""")
    assert (total.hbm_bytes, total.seconds) == (1600, 0)


SEND = """
%after = token[] after-all()
%send = (f32[50], u32[], token[]) send(%x, %after), frontend_attributes={\
_xla_host_transfer_rendezvous="r0",_xla_megascale_target={{0,1}},\
_xla_megascale_transfer_type="ALL_TO_ALL"}
%recv = (f32[50], u32[], token[]) recv(%after), frontend_attributes={\
_xla_host_transfer_rendezvous="r0",_xla_megascale_target={{0,1}},\
_xla_megascale_transfer_type="ALL_TO_ALL"}
"""


def test_a_transfer_between_slices_runs_beside_the_links(walk):
    total = walk(f"""
{SEND}
%start = {START}
%dot = {DOT}
%done = {GATHERED} all-gather-done(%start)
%sent = token[] send-done(%send)
%received = (f32[50], token[]) recv-done(%recv)
""")
    # 100 bytes at 1 byte/s from the start on, the gather's 20 s within them.
    assert total.seconds == 100
    crossing = total.traffic[("all-to-all", ("expert",))]
    assert (crossing.count, crossing.wire, crossing.seconds) == (1, 100, 100)
    assert (crossing.exposed, total.traffic[KEY].exposed) == (80, 4)
    assert total.hbm_bytes == 0


def test_sends_to_the_host_cost_nothing(walk):
    total = walk("""
%after = token[] after-all()
%send = (f32[50], u32[], token[]) send(%x, %after), is_host_transfer=true
%sent = token[] send-done(%send)
""")
    assert total.seconds == 0 and not total.traffic
