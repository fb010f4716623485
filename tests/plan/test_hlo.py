"""The parser: shapes, instructions and computations, by hand and of real programs."""

import re

import pytest

from moe_jax.plan import hlo


@pytest.mark.parametrize(
    "text, nbytes, padded",
    [
        ("f32[3,5]{1,0:T(8,128)}", 60, 8 * 128 * 4),
        ("bf16[9,130]{1,0:T(8,128)(2,1)}", 2340, 16 * 256 * 2),
        # The first dimension is the fast one: 9 lanes, 130 sublanes.
        ("f32[9,130]{0,1:T(8,128)}", 4680, 128 * 136 * 4),
        ("f32[2,3,5]{2,1,0:T(8,128)}", 120, 2 * 8 * 128 * 4),
        ("f32[2,3,5]{0,2,1:T(8,128)}", 120, 3 * 8 * 128 * 4),
        ("pred[4,1000]{1,0:T(4,128)(4,1)}", 4000, 4 * 1024),
        ("s32[7]{0:T(128)}", 28, 512),
        ("f32[1025]{0:T(1024)}", 4100, 8192),
        ("f32[3,5]{1,0}", 60, 60),
        ("f32[3,5]", 60, 60),
        ("s4[3,5]{1,0}", 7.5, 7.5),
        ("f8e4m3fn[16]{0}", 16, 16),
        ("f32[]", 4, 4),
        ("f32[0,5]{1,0:T(8,128)}", 0, 0),
    ],
)
def test_bytes_of_a_shape(text, nbytes, padded):
    (shape,) = hlo.parse_shapes(text)
    assert (shape.nbytes, shape.padded_bytes) == (nbytes, padded)


def test_fields_of_a_shape():
    (shape,) = hlo.parse_shapes("bf16[9,130]{0,1:T(8,128)(2,1)S(1)}")
    assert shape == hlo.Shape("bf16", (9, 130), (0, 1), (8, 128), memory_space=1)
    assert shape.size == 1170
    assert hlo.parse_shapes("bf16[9]{0}")[0].memory_space == hlo.HBM


def test_shapes_of_a_tuple_are_its_leaves():
    shapes = hlo.parse_shapes(
        "((f32[2]{0}, pred[]), bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, token[], "
        "u32[]{:S(2)}, f32[3]{0}, /*index=5*/s32[4,4]{1,0})"
    )
    kinds = [(s.dtype, s.dims, s.memory_space) for s in shapes]
    assert kinds == [
        ("f32", (2,), 0),
        ("pred", (), 0),
        ("bf16", (8, 128), 1),
        ("token", (), 0),
        ("u32", (), 2),
        ("f32", (3,), 0),
        ("s32", (4, 4), 0),
    ]


TEXT = r"""
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

FileNames
1 "/a/b.py"

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main.7 (x: f32[8], /*index=1*/y: (f32[2], s32[])) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0), metadata={op_name="state.params[\'w\'][\'b\']"}
  %y = (f32[2]{0}, s32[]) parameter(1)
  %two = s32[]{:T(128)} get-tuple-element(%y), index=1
  %pair = (f32[8]{0}, f32[8]{0}) fusion(%x, /*index=1*/%x), kind=kLoop, calls=%fused.2
  %call.3 = f32[8]{0} custom-call(%x, %two), custom_call_target="k", backend_config={"a":{"b":"1"},"text":"first
second %z = line"}, metadata={op_name="jit(f)/scope/dot"}
  %dot = f32[8]{0} fusion(%call.3), calls=%fused, backend_config={"estimated_cycles":"5772","cost_model_type":"COST_MODEL_TYPE_CLASSIC"}
  %sum.2 = f32[8]{0} add(%dot, %x), backend_config={"estimated_cycles":"35","cost_model_type":"COST_MODEL_TYPE_INVALID"}
  ROOT %reduce = f32[8]{0} all-reduce(%sum.2), replica_groups={{0,1},{2,3}}, to_apply=%add.1, metadata={op_name="jit(f)/psum"}
}
"""  # noqa: E501


@pytest.fixture
def module():
    return hlo.parse(TEXT)


def test_computations_entry_and_roots(module):
    assert list(module.computations) == ["add.1", "main.7"]
    assert module.entry == "main.7"
    main = module.computations["main.7"]
    assert [i.name for i in main.instructions] == [
        *("x", "y", "two", "pair", "call.3", "dot", "sum.2", "reduce")
    ]
    assert main.root.name == "reduce"
    assert module.computations["add.1"].root.opcode == "add"


def test_operands_and_users(module):
    main = module.computations["main.7"]
    assert main.by_name["pair"].operands == ("x", "x")
    assert [i.name for i in main.operands(main.by_name["sum.2"])] == ["dot", "x"]
    users = [(i.name, place) for i, place in main.users["x"]]
    assert users == [("pair", 0), ("pair", 1), ("call.3", 0), ("sum.2", 1)]


def test_attributes(module):
    main = module.computations["main.7"].by_name
    assert main["reduce"].reference("to_apply") == "add.1"
    assert main["pair"].reference("calls") == "fused.2"
    assert main["pair"].reference("body") is None
    assert main["two"].index == 1
    assert [main[name].index for name in "xy"] == [0, 1]
    assert main["x"].op_name == "state.params['w']['b']"
    assert main["y"].op_name == ""
    # A line break within an attribute ends no instruction.
    assert main["call.3"].op_name == "jit(f)/scope/dot"
    assert main["call.3"].operands == ("x", "two")


def test_only_estimates_of_matrix_products_count(module):
    main = module.computations["main.7"].by_name
    cycles = [main[name].matmul_cycles for name in ("dot", "sum.2", "reduce")]
    assert cycles == [5772, None, None]


@pytest.mark.parametrize("text", ["", TEXT.replace("ENTRY ", ""), "not HLO {\n}\n"])
def test_a_text_without_entry_is_refused(text):
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse(text)


@pytest.mark.parametrize("step", ["tpu_step", "host_step"])
def test_nothing_of_a_compiled_step_is_lost(request, step):
    text = request.getfixturevalue(step).text
    module = hlo.parse(text)
    found = [i for c in module.computations.values() for i in c.instructions]
    names = re.findall(r"^ +(?:ROOT )?%(\S+) = ", text, re.MULTILINE)
    assert [i.name for i in found] == names and len(names) > 1000
    for comp in module.computations.values():
        for instruction in comp.instructions:
            assert len(comp.operands(instruction)) == len(instruction.operands)


def test_padding_is_what_the_compiler_allocates(tpu_step):
    values = re.findall(
        r"@\d+> \(size=(\d+),offset=\d+\): (\w+\[.*\])(\{\S*\})$",
        tpu_step.buffers,
        re.MULTILINE,
    )
    sizes = {
        (dims + layout): int(size) for size, dims, layout in values if "T(" in layout
    }
    assert len(sizes) > 50
    for text, size in sizes.items():
        (shape,) = hlo.parse_shapes(text)
        if len(shape.dims) >= 1 and shape.memory_space == hlo.HBM:
            assert -(-shape.padded_bytes // 512) * 512 == size, text
