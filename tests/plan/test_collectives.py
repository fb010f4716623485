"""Groups, axes, bytes and seconds of collectives, by hand and of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config import MeshConfig
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.plan import collectives, hlo, schedule
from moe_jax.plan.collectives import Network

AXES = ("data", "fsdp", "expert", "context", "tensor")


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("{{0,4,8},{1,5,9}}", [0, 4, 8]),
        ("{{3}}", [3]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        # Columns of a table of 2 by 4.
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        # The last and the first of (2, 3, 4) together, the middle one apart.
        ("[3,8]<=[2,3,4]T(1,0,2)", [0, 1, 2, 3, 12, 13, 14, 15]),
        ("mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("mesh['a'=2,'b'=3,'c'=2] {'c','a'}", [0, 1, 6, 7]),
        ("{}", []),
    ],
)
def test_first_group(groups, expected):
    found = collectives.first_group(f", channel_id=3, replica_groups={groups}, x={{1}}")
    assert sorted(found) == expected


def network(toy, sizes, slices=1):
    count = int(np.prod(sizes))
    per_slice = count // slices
    slice_of = tuple(device // per_slice for device in range(count))
    return Network(dict(zip(AXES, sizes, strict=True)), slice_of, toy)


@pytest.mark.parametrize(
    "devices, expected",
    [
        ([0, 1], ("tensor",)),
        ([0, 2], ("context",)),
        ([0, 2, 4, 6], ("expert", "context")),
        ([1, 9, 17], ("fsdp",)),
        ([0, 24], ("data",)),
        (range(48), AXES),
        ([5], ()),
    ],
)
def test_axes_of_a_group(toy, devices, expected):
    # (2, 3, 2, 2, 2): strides 24, 8, 4, 2, 1.
    assert network(toy, (2, 3, 2, 2, 2)).axes(devices) == expected


@pytest.fixture
def measure(main_of, toy):
    """The collective that the lines end with, on data=2, expert=4."""

    def run(lines, slices=1):
        _, main = main_of(lines)
        kind = collectives.base_kind(main.root.opcode)
        where = network(toy, (2, 1, 4, 1, 1), slices)
        return collectives.measure(where, main, main.root, kind)

    return run


@pytest.mark.parametrize(
    "operation, payload, wire, hops",
    [
        # 1000 f32 on each of four devices.
        ("all-gather(%x), {g}, dimensions={0}", 16000, 12000, 1),
        ("all-reduce(%x), {g}, to_apply=%add", 4000, 6000, 1),
        ("reduce-scatter(%x), {g}, dimensions={0}, to_apply=%add", 4000, 3000, 1),
        ("all-to-all(%x), {g}, dimensions={0}", 4000, 3000, 1),
        ("all-to-all(%q, %q, %q, %q), {g}", 4000, 3000, 1),
        ("all-gather-start(%x), {g}, dimensions={0}", 16000, 12000, 1),
        ("all-reduce(%x, %q), {g}, to_apply=%add", 5000, 7500, 1),
        ("ragged-all-to-all(%x, %out, %q), {g}", 4000, 3000, 1),
    ],
)
def test_bytes_by_hand(measure, operation, payload, wire, hops):
    lines = f"""
    %x = f32[1000] parameter(0)
    %q = f32[250] parameter(1)
    %out = f32[1600] parameter(2)
    ROOT %c = f32[1000] {operation.replace("{g}", "replica_groups={{0,1,2,3}}")}
    """
    found = measure(lines)
    assert (found.axes, found.payload, found.wire) == (("expert",), payload, wire)
    assert found.seconds == wire * hops / 10


def test_all_to_all_over_eight_pays_for_its_hops(measure):
    found = measure("""
    %x = f32[1000] parameter(0)
    ROOT %c = f32[1000] all-to-all(%x), replica_groups={}, dimensions={0}
    """)
    assert (found.axes, found.wire) == (("data", "expert"), 3500)
    assert found.seconds == 3500 * (8 / 4) / 10


def test_padding_is_not_sent(measure):
    found = measure("""
    %x = f32[3,5]{1,0:T(8,128)} parameter(0)
    ROOT %c = f32[6,5]{1,0:T(8,128)} all-gather(%x), replica_groups={{0,4}}
    """)
    assert (found.axes, found.payload, found.wire) == (("data",), 120, 60)


PERMUTE = """
%x = bf16[1000] parameter(0)
ROOT %c = (bf16[1000], bf16[1000]) collective-permute-start(%x), \
source_target_pairs={pairs}
"""


def test_permutation(measure):
    pairs = "{{0,1},{1,2},{2,3},{3,0}}"
    found = measure(PERMUTE.replace("{pairs}", pairs))
    assert (found.axes, found.payload, found.wire) == (("expert",), 2000, 2000)
    assert found.seconds == 200
    both = measure(PERMUTE.replace("{pairs}", "{{0,1},{1,4}}"))
    assert both.axes == ("data", "expert")


def test_between_slices_the_network_is_slow(measure):
    gather = """
    %x = f32[1000] parameter(0)
    ROOT %c = f32[2000] all-gather(%x), replica_groups={{GROUP}}, dimensions={0}
    """
    far = measure(gather.replace("GROUP", "0,4"), slices=2)
    near = measure(gather.replace("GROUP", "0,1"), slices=2)
    assert (far.axes, far.seconds) == (("data",), 4000)
    assert (near.axes, near.seconds) == (("expert",), 400)
    permute = PERMUTE.replace("{pairs}", "{{0,4},{4,0}}")
    assert measure(permute, slices=2).seconds == 2000
    assert measure(permute, slices=1).seconds == 200


@pytest.mark.parametrize(
    "part, groups, expected",
    [
        ("256,8", "{{0,1,2,3}}", True),
        ("264,8", "{{0,1,2,3}}", True),  # Padded to whole tiles.
        ("512,8", "{{0,1,2,3}}", False),
        ("1024,8", "{{0,1,2,3}}", False),
        ("1024,8", "{{0}}", False),
    ],
)
def test_all_reduce_that_keeps_a_part_is_a_reduce_scatter(
    main_of, part, groups, expected
):
    _, main = main_of(f"""
    %x = f32[1024,8] parameter(0)
    %r = f32[1024,8] all-reduce(%x), replica_groups={groups}, to_apply=%add
    ROOT %f = f32[{part}] fusion(%r), kind=kLoop, calls=%g
    """)
    found = collectives.reduce_scatter(main.root, main.by_name["r"])
    assert found is expected


def test_only_collectives_have_a_kind():
    assert collectives.base_kind("all-gather-start") == "all-gather"
    assert collectives.base_kind("ragged-all-to-all") == "ragged-all-to-all"
    for opcode in ("all-gather-done", "copy-start", "fusion", "add"):
        assert collectives.base_kind(opcode) is None


@pytest.fixture
def traffic(find):
    """Traffic of a function on each device's 1024 x 1024 f32: 4 MiB."""

    def run(function, name="v5e:2x4", slices=1, **mesh):
        where = find(name, slices)
        over = mesh_lib.make_mesh(MeshConfig(**mesh), list(where.devices))
        spec = PartitionSpec(("data", "fsdp", "expert"))
        shape = (over.size * 1024, 1024)
        rows = jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(over, spec)
        )
        mapped = jax.shard_map(
            function, mesh=over, in_specs=spec, out_specs=spec, check_vma=False
        )
        with jax.set_mesh(over):
            text = jax.jit(mapped).lower(rows).compile().as_text()
        walk = schedule.Walk(hlo.parse(text), Network.of(over, where.chip))
        return walk.run().traffic

    return run


MIB = 2**20


def next_one(n):
    return [(i, (i + 1) % n) for i in range(n)]


@pytest.mark.parametrize("axis, n", [("data", 2), ("expert", 4)])
@pytest.mark.parametrize(
    "kind, function, payload, wire",
    [
        ("all-reduce", lambda x, a, n: lax.psum(x, a), lambda n: 4, lambda n: 8),
        (
            "all-gather",
            lambda x, a, n: lax.all_gather(x, a, tiled=True),
            lambda n: 4 * n,
            lambda n: 4 * n,
        ),
        (
            "reduce-scatter",
            lambda x, a, n: lax.psum_scatter(x, a, tiled=True),
            lambda n: 4,
            lambda n: 4,
        ),
        (
            "all-to-all",
            lambda x, a, n: lax.all_to_all(x, a, 0, 0, tiled=True),
            lambda n: 4,
            lambda n: 4,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compiled_collective(traffic, kind, function, payload, wire, axis, n):
    found = traffic(lambda x: function(x, axis, n), data=2, expert=4)
    (key,) = found
    assert key == (kind, (axis,))
    assert found[key].count == 1
    assert found[key].payload == payload(n) * MIB
    # Each device keeps one n-th of what it would send.
    assert found[key].wire == wire(n) * MIB * (n - 1) / n
    assert found[key].seconds == pytest.approx(found[key].wire / 50e9)


@pytest.mark.parametrize("axis, n", [("data", 2), ("expert", 4)])
def test_compiled_permutation(traffic, axis, n):
    found = traffic(lambda x: lax.ppermute(x, axis, next_one(n)), data=2, expert=4)
    assert list(found) == [("collective-permute", (axis,))]
    (one,) = found.values()
    assert (one.count, one.payload, one.wire) == (1, 4 * MIB, 4 * MIB)


def test_compiled_sum_over_all_axes(traffic):
    found = traffic(lambda x: lax.psum(x, ("data", "expert")), data=2, expert=4)
    assert found[("all-reduce", ("data", "expert"))].wire == 2 * 4 * MIB * 7 / 8


@pytest.mark.parametrize(
    "kind, function, payload, wire",
    [
        ("all-reduce", lambda x: lax.psum(x, "data"), 4, 8 * 3 / 4),
        ("all-gather", lambda x: lax.all_gather(x, "data", tiled=True), 16, 12),
        ("reduce-scatter", lambda x: lax.psum_scatter(x, "data", tiled=True), 4, 3),
        ("all-to-all", lambda x: lax.all_to_all(x, "data", 0, 0, tiled=True), 4, 3),
        ("collective-permute", lambda x: lax.ppermute(x, "data", next_one(4)), 4, 4),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compiled_collective_between_slices(traffic, kind, function, payload, wire):
    found = traffic(function, name="v5e:2x2", slices=4, data=4, expert=4)
    assert list(found) == [(kind, ("data",))]
    (one,) = found.values()
    assert (one.count, one.payload, one.wire) == (1, payload * MIB, wire * MIB)
    assert one.seconds == pytest.approx(one.wire / 3.1e9)
    assert one.exposed == one.seconds


def test_a_sum_over_all_sends_a_part_between_slices(traffic):
    found = traffic(
        lambda x: lax.psum(x, ("data", "expert")),
        name="v5e:2x2",
        slices=2,
        data=2,
        expert=4,
    )
    # Within a slice to a quarter each, that between the two, then back.
    assert found[("reduce-scatter", ("expert",))].wire == 3 * MIB
    assert found[("all-reduce", ("data",))].wire == 1 * MIB
    assert found[("all-gather", ("expert",))].wire == 3 * MIB
