"""FLOPs and HBM bytes of instructions, against hand counts and XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from moe_jax.plan import hlo, work


def flops(module):
    meter, main = work.Meter(module), module.computations[module.entry]
    return sum(meter.flops(main, i) for i in main.instructions)


@pytest.fixture
def moved(main_of):
    """HBM bytes of the root of a program of these lines."""

    def measure(lines, before=""):
        module, main = main_of(lines, before)
        return work.Meter(module).hbm_bytes(main, main.root)

    return measure


DOT = """
%a = f32[{a}] parameter(0)
%b = f32[{b}] parameter(1)
ROOT %c = f32[{c}] dot(%a, %b), {dims}
"""


@pytest.mark.parametrize(
    "a, b, c, dims, expected",
    [
        ("4,8", "8,16", "4,16", "lhs_contracting_dims={1}", 2 * 4 * 8 * 16),
        (
            "3,4,8",
            "3,8,16",
            "3,4,16",
            "lhs_batch_dims={0}, lhs_contracting_dims={2}",
            2 * 3 * 4 * 8 * 16,
        ),
        ("5,8,7", "7,8,2", "5,2", "lhs_contracting_dims={1,2}", 2 * 5 * 2 * 56),
        ("6", "7", "6,7", "lhs_contracting_dims={}", 2 * 42),
    ],
)
def test_flops_of_a_dot(main_of, a, b, c, dims, expected):
    module, _ = main_of(DOT.format(a=a, b=b, c=c, dims=dims))
    assert flops(module) == expected


def test_flops_within_fusions_count(main_of):
    inner = """
    %inner (p: f32[4,8], q: f32[8,16]) -> f32[4,16] {
      %p = f32[4,8] parameter(0)
      %q = f32[8,16] parameter(1)
      ROOT %d = f32[4,16] dot(%p, %q), lhs_contracting_dims={1}
    }

    %outer (p2: f32[4,8], q2: f32[8,16]) -> f32[4,16] {
      %p2 = f32[4,8] parameter(0)
      %q2 = f32[8,16] parameter(1)
      %d2 = f32[4,16] fusion(%p2, %q2), kind=kOutput, calls=%inner
      ROOT %e = f32[4,16] add(%d2, %d2)
    }
    """
    lines = DOT.format(a="4,8", b="8,16", c="4,16", dims="").replace("dot(", "fusion(")
    module, _ = main_of(lines.replace("), ", "), kind=kLoop, calls=%outer"), inner)
    assert flops(module) == 2 * 4 * 8 * 16


def multiplications(inputs, size, stride, low, high, lhs_dilate, rhs_dilate):
    """Outputs of a window that slides over ones, and how many ones it meets."""
    spread = np.zeros((inputs - 1) * lhs_dilate + 1, int)
    spread[::lhs_dilate] = 1
    cut = spread[max(0, -low) : len(spread) - max(0, -high)]
    padded = np.pad(cut, (max(0, low), max(0, high)))
    places = range(0, len(padded) - (size - 1) * rhs_dilate, stride)
    seen = [padded[p : p + (size - 1) * rhs_dilate + 1 : rhs_dilate] for p in places]
    return len(seen), int(np.sum(seen))


@pytest.mark.parametrize(
    "window",
    [  # inputs, size, stride, low, high, lhs_dilate, rhs_dilate
        (10, 3, 1, 0, 0, 1, 1),
        (10, 3, 1, 1, 1, 1, 1),
        (10, 4, 3, 2, 1, 1, 1),
        (10, 3, 1, 0, 0, 1, 2),
        (10, 3, 1, 3, 1, 1, 2),
        (10, 3, 2, 4, 3, 2, 3),
        (10, 5, 1, 4, 4, 3, 1),
        (10, 3, 1, -1, -2, 1, 1),
        (4, 4, 3, 0, 0, 4, 1),  # A batch of four, as XLA:TPU writes it.
        (4, 4, 1, 3, 3, 1, 1),
    ],
)
def test_taps_on_padding_and_holes_are_not_counted(main_of, window):
    inputs, size, stride, low, high, lhs_dilate, rhs_dilate = window
    outputs, products = multiplications(*window)
    module, _ = main_of(f"""
    %x = f32[2,{inputs},6] parameter(0)
    %w = f32[{size},6,8] parameter(1)
    ROOT %y = f32[2,{outputs},8] convolution(%x, %w), window={{size={size} \
stride={stride} pad={low}_{high} lhs_dilate={lhs_dilate} rhs_dilate={rhs_dilate} \
rhs_reversal=1}}, dim_labels=b0f_0io->b0f
    """)
    assert flops(module) == 2 * products * 2 * 6 * 8


def test_window_of_two_dimensions_and_of_none(main_of):
    module, _ = main_of("""
    %x = f32[5,10,12,6] parameter(0)
    %w = f32[3,5,6,8] parameter(1)
    ROOT %y = f32[5,10,8,8] convolution(%x, %w), window={size=3x5 pad=1_1x0_0}, \
dim_labels=b01f_01io->b01f
    """)
    # Ten outputs by three taps, less one at each end; eight outputs by five taps.
    assert flops(module) == 2 * 28 * 40 * 5 * 6 * 8
    module, _ = main_of("""
    %x = f32[5,6] parameter(0)
    %w = f32[6,8] parameter(1)
    ROOT %y = f32[5,8] convolution(%x, %w), dim_labels=bf_io->bf
    """)
    assert flops(module) == 2 * 5 * 6 * 8


def convolve(**arguments):
    numbers = ("NWC", "WIO", "NWC")
    return lambda x, w: lax.conv_general_dilated(
        x, w, dimension_numbers=numbers, **arguments
    )


@pytest.mark.parametrize(
    "x, w, arguments",
    [
        ((8, 10, 3), (4, 3, 16), {"padding": "SAME"}),
        ((8, 10, 3), (4, 3, 16), {"padding": "VALID", "batch_group_count": 4}),
        ((8, 10, 6), (4, 3, 16), {"padding": "VALID", "feature_group_count": 2}),
        ((8, 10, 3), (4, 3, 16), {"padding": "VALID", "rhs_dilation": (2,)}),
        ((8, 10, 3), (4, 3, 16), {"padding": [(3, 3)], "lhs_dilation": (2,)}),
    ],
)
def test_convolution_agrees_with_xla(x, w, arguments):
    function = convolve(window_strides=(1,), **arguments)
    compiled = jax.jit(function).lower(jnp.ones(x), jnp.ones(w)).compile()
    expected = compiled.cost_analysis()["flops"]
    assert flops(hlo.parse(compiled.as_text())) == expected > 0


@pytest.mark.parametrize(
    "spec, a, b, expected",
    [
        ("mk,kn->mn", (256, 512), (512, 1024), 256 * 512 * 1024),
        ("bmk,bkn->bmn", (4, 96, 160), (4, 160, 224), 4 * 96 * 160 * 224),
        ("bkm,bkn->mn", (4, 96, 160), (4, 96, 224), 4 * 96 * 160 * 224),
        (
            "bshd,bthd->bhst",
            (2, 128, 4, 64),
            (2, 256, 4, 64),
            2 * 4 * 128 * 256 * 64,
        ),
    ],
)
def test_products_of_a_tpu_program(compile_text, spec, a, b, expected):
    text = compile_text(lambda x, y: jnp.einsum(spec, x, y), a, b)
    assert flops(hlo.parse(text)) == 2 * expected


TILED = "{1,0:T(8,128)}"


def test_elementwise_reads_and_writes_all(moved):
    add = f"""
    %a = f32[60,130]{TILED} parameter(0)
    %b = f32[60,130]{TILED} parameter(1)
    ROOT %c = f32[60,130]{TILED} add(%a, %b)
    """
    assert moved(add) == 3 * (64 * 256 * 4)
    fast = add.replace("%b = f32[60,130]{1,0:T(8,128)}", "%b = f32[60,130]{1,0:S(1)}")
    assert moved(fast) == 2 * (64 * 256 * 4)


@pytest.mark.parametrize(
    "operation",
    [
        "slice(%big), slice={[0:8], [0:128]}",
        "dynamic-slice(%big, %at, %at), dynamic_slice_sizes={8,128}",
        "gather(%big, %at), slice_sizes={8,128}",
    ],
)
def test_a_slice_moves_only_its_part(moved, operation):
    lines = f"""
    %big = f32[800,128]{TILED} parameter(0)
    %at = s32[]{{:S(2)}} parameter(1)
    ROOT %part = f32[8,128]{TILED} {operation}
    """
    assert moved(lines) == 2 * 4096


def test_an_update_in_place_moves_only_the_update(moved):
    lines = f"""
    %big = f32[800,128]{TILED} parameter(0)
    %new = f32[8,128]{TILED} parameter(1)
    %at = s32[]{{:S(2)}} parameter(2)
    ROOT %out = f32[800,128]{TILED} dynamic-update-slice(%big, %new, %at, %at)
    """
    assert moved(lines) == 2 * 4096
    # The same within a fusion, seen through a bitcast.
    inner = (
        """
    %inner (p: f32[800,128], q: f32[8,128], r: s32[]) -> f32[800,1,128] {{
      %p = f32[800,128]{0} parameter(0)
      %q = f32[8,128]{0} parameter(1)
      %r = s32[]{{:S(2)}} parameter(2)
      %u = f32[800,128]{0} dynamic-update-slice(%p, %q, %r, %r)
      ROOT %v = f32[800,128]{0} bitcast(%u)
    }}
    """.replace("{0}", TILED)
        .replace("{{", "{")
        .replace("}}", "}")
    )
    call = "fusion(%big, %new, %at), kind=kLoop, calls=%inner"
    fused = lines.replace("dynamic-update-slice(%big, %new, %at, %at)", call)
    assert moved(fused, inner) == 2 * 4096


FUSED = f"""
%slices (p: f32[800,128], q: f32[8,128], at: s32[]) -> f32[8,128] {{
  %p = f32[800,128]{TILED} parameter(0)
  %q = f32[8,128]{TILED} parameter(1)
  %at = s32[]{{:S(2)}} parameter(2)
  %flat = f32[800,128]{TILED} bitcast(%p)
  %part = f32[8,128]{TILED} dynamic-slice(%flat, %at, %at)
  ROOT %sum = f32[8,128]{TILED} add(%part, %q)
}}

%nested (p2: f32[800,128], q2: f32[8,128], at2: s32[]) -> f32[8,128] {{
  %p2 = f32[800,128]{TILED} parameter(0)
  %q2 = f32[8,128]{TILED} parameter(1)
  %at2 = s32[]{{:S(2)}} parameter(2)
  ROOT %f = f32[8,128]{TILED} fusion(%p2, %q2, %at2), kind=kLoop, calls=%slices
}}

%both (p3: f32[800,128], q3: f32[8,128], at3: s32[]) -> f32[8,128] {{
  %p3 = f32[800,128]{TILED} parameter(0)
  %q3 = f32[8,128]{TILED} parameter(1)
  %at3 = s32[]{{:S(2)}} parameter(2)
  %part3 = f32[8,128]{TILED} dynamic-slice(%p3, %at3, %at3)
  %all = f32[] reduce(%p3, %at3), dimensions={{0,1}}
  ROOT %sum3 = f32[8,128]{TILED} add(%part3, %q3)
}}

%pair (p4: f32[800,128], q4: f32[8,128], at4: s32[]) -> (f32[8,128], f32[800,128]) {{
  %p4 = f32[800,128]{TILED} parameter(0)
  %q4 = f32[8,128]{TILED} parameter(1)
  %at4 = s32[]{{:S(2)}} parameter(2)
  %twice = f32[8,128]{TILED} add(%q4, %q4)
  %new = f32[800,128]{TILED} dynamic-update-slice(%p4, %q4, %at4, %at4)
  ROOT %both4 = (f32[8,128]{TILED}, f32[800,128]{TILED}) tuple(%twice, %new)
}}
"""


@pytest.mark.parametrize(
    "called, result, expected",
    [
        ("slices", "f32[8,128]", 3 * 4096),
        ("nested", "f32[8,128]", 3 * 4096),
        ("both", "f32[8,128]", 2 * 4096 + 800 * 512),
        ("pair", f"(f32[8,128]{TILED}, f32[800,128]{TILED})", 3 * 4096),
    ],
)
def test_a_fusion_reads_what_it_uses(moved, called, result, expected):
    lines = f"""
    %big = f32[800,128]{TILED} parameter(0)
    %small = f32[8,128]{TILED} parameter(1)
    %index = s32[]{{:S(2)}} parameter(2)
    ROOT %out = {result} fusion(%big, %small, %index), kind=kLoop, calls=%{called}
    """
    assert moved(lines, FUSED) == expected
