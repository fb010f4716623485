"""Work of kernels: XLA's grouped product as compiled, formulas on calls by hand."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from moe_jax.config import MeshConfig
from moe_jax.nn.attention import sharded
from moe_jax.nn.attention.common import PLAIN, Scoring
from moe_jax.nn.attention.splash import Splash
from moe_jax.parallel import rules
from moe_jax.parallel.mesh import make_mesh
from moe_jax.plan import hlo, kernels, schedule
from moe_jax.plan.collectives import Network


@pytest.fixture
def work_of(main_of):
    """Work of the kernel call that the lines end with."""

    def measure(lines, fill=1.0):
        _, main = main_of(lines)
        assert kernels.is_kernel(main.root)
        return kernels.kernel_work(main, main.root, 77.0, fill)

    return measure


CALL = 'custom_call_target="tpu_custom_call"'


def compiled_calls(compile_text, function, rows, k, n, groups):
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    # XLA has a kernel of its own on v5p; on v5e a product that skips groups.
    text = compile_text(function, (rows, k), (groups, k, n), sizes, name="v5p:2x2x1")
    main = hlo.parse(text)
    main = main.computations[main.entry]
    return main, [i for i in main.instructions if kernels.is_kernel(i)]


def grid_steps(main, call):
    """Tiles of rows in the kernel's own table of its grid: two vectors of them."""
    vectors = [i.shapes[0].dims for i in main.operands(call)]
    lengths = [dims[0] for dims in vectors if len(dims) == 1]
    return max(lengths)


@pytest.mark.parametrize(
    "rows, k, n, groups", [(1024, 256, 512, 4), (4096, 512, 1024, 8)]
)
def test_ragged_dot_does_the_tiles_of_its_grid(compile_text, rows, k, n, groups):
    main, calls = compiled_calls(compile_text, lax.ragged_dot, rows, k, n, groups)
    (call,) = [i for i in calls if "metadata" not in i.name]
    tile = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', call.attributes)
    tm, tk, tn = (int(size) for size in tile.groups())
    assert (tk, tn) == (k, n)  # Else the grid has more than rows.
    tiles = grid_steps(main, call)
    assert tiles == rows // tm + groups - 1
    found = kernels.kernel_work(main, call, 77.0, 1.0)
    assert found.kind == "gmm" and found.known
    assert found.flops == 2 * tiles * tm * k * n
    # Rows in and out, all weights once; two bytes each.
    assert found.hbm_bytes == 2 * (rows * k + groups * k * n + rows * n)
    half = kernels.kernel_work(main, call, 77.0, 0.5)
    assert half.flops == 2 * (rows / 2 + tm * (groups - 1)) * k * n


@pytest.mark.parametrize("fill, tiles", [(1.0, 8), (0.5, 4)])
def test_a_product_that_skips_groups(compile_text, toy, fill, tiles):
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    text = compile_text(lax.ragged_dot, (1024, 256), (4, 256, 512), sizes)
    rows, _ = re.search(
        r'"output_window_bounds":\["1","(\d+)","(\d+)"\]', text
    ).groups()
    assert 'num_groups_in_ragged_dot":"4"' in text and 8 * int(rows) == 128
    network = Network({"data": 1}, (0,), toy)
    found = schedule.Walk(hlo.parse(text), network, fill=fill).run()
    # Tiles of 128 rows by all columns, three of them for two groups.
    assert found.flops == 2 * (tiles + 3) * 128 * 256 * 512


def test_other_products_skip_nothing(compile_text):
    text = compile_text(jnp.dot, (256, 256), (256, 512))
    main = hlo.parse(text)
    root = main.computations[main.entry].root
    assert kernels.visited_share(root, 0.5) == 1


def test_gradient_of_ragged_dot_is_two_kernels(compile_text):
    def gradients(x, w, sizes):
        total = lambda x, w: lax.ragged_dot(x, w, sizes).astype(jnp.float32).sum()
        return jax.grad(total, (0, 1))(x, w)

    main, calls = compiled_calls(compile_text, gradients, 1024, 256, 512, 4)
    found = [kernels.kernel_work(main, call, 77.0, 1.0) for call in calls]
    assert sorted(w.kind for w in found if w.flops) == ["gmm", "tgmm"]
    assert {w.flops for w in found if w.flops} == {2 * 11 * 128 * 256 * 512}
    assert {w.hbm_bytes for w in found if w.kind == "metadata"} == {77.0}
    assert all(w.known for w in found)


def test_tiles_that_do_not_divide_are_whole(work_of):
    lines = f"""
    %x = bf16[4000,1000] parameter(0)
    %dy = bf16[4000,1200] parameter(1)
    ROOT %ragged-dot-none.3 = bf16[8,1000,1200] custom-call(%x, %dy), {CALL}, \
frontend_attributes={{ragged_dot_tiling="32,1000,640"}}
    """
    found = work_of(lines)
    assert found.kind == "tgmm"
    assert found.flops == 2 * (125 + 7) * 32 * 1000 * 1280
    # Rows of x once for each of two tiles of columns.
    moved = 2 * 4000 * 1000 + 4000 * 1200 + 8 * 1000 * 1200
    assert found.hbm_bytes == 2 * moved


def test_megablox_names_its_tiles_otherwise(work_of):
    lines = f"""
    %x = bf16[1024,512] parameter(0)
    %w = bf16[4,512,256] parameter(1)
    ROOT %gmm.1 = bf16[1024,256] custom-call(%x, %w), {CALL}, \
backend_config={{"metadata":"{{\\"tile_m\\": 256, \\"tile_k\\": 128, \\"tile_n\\": 256"
    """
    found = work_of(lines)
    tiles = 1024 / 256 + 3
    assert found.flops == 2 * tiles * 256 * 512 * 256
    # Four tiles along k: a tile of rows reads its group's weights anew.
    assert found.hbm_bytes == 2 * (1024 * 512 + tiles * 512 * 256 + 1024 * 256)


@pytest.mark.parametrize(
    "name, products",
    [
        ("splash_mha_fwd", 2),
        ("splash_mha_dq", 3),
        ("splash_mha_dkv", 4),
        ("splash_mha_fused_dkv", 5),
        ("flash_attention_bwd", 3),
    ],
)
def test_causal_attention_is_half_of_its_products(work_of, name, products):
    lines = f"""
    %q = bf16[8,256,128] parameter(0)
    %k = bf16[2,256,128] parameter(1)
    %v = bf16[2,256,128] parameter(2)
    ROOT %{name}.4 = bf16[8,256,128] custom-call(%q, %k, %v), {CALL}
    """
    full = 2 * 8 * 256 * 256 * 128
    found = work_of(lines)  # No tiles are named.
    assert (found.kind, found.known) == ("attention", True)
    assert (found.flops, found.hbm_bytes) == (products * full / 2, 77.0)


@pytest.fixture(scope="module")
def splash_calls(find):
    """`splash_calls(context=2)`: kernels of attention and its derivative, v5e:2x2.

    Two rows of 1024 bfloat16 positions, 4 heads of 64 on 2 kv heads, blocks of 256.
    """

    def make(scoring=PLAIN, width=64, values=64, fused=False, **sizes):
        mesh = make_mesh(MeshConfig(**sizes), find("v5e:2x2").devices)
        shaped = lambda axes, shape, dtype: jax.ShapeDtypeStruct(
            shape, dtype, sharding=rules.sharding(mesh, axes)
        )
        heads = lambda n, width: shaped(
            ("batch", "sequence", "heads", None), (2, 1024, n, width), jnp.bfloat16
        )
        segments = shaped(("batch", "sequence"), (2, 1024), jnp.int32)
        options = Splash(block_q=256, block_kv=256, fused_backward=fused)
        given = [heads(4, width), heads(2, width), heads(2, values)]
        given.append(shaped(("heads",), (4,), jnp.float32))

        def loss(q, k, v, sinks, segments):
            with_sinks = dataclasses.replace(scoring, sinks=sinks)
            used = with_sinks if scoring.softcap else scoring
            return jnp.sum(sharded.run(options, q, k, v, segments, used) ** 2)

        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(loss, argnums=tuple(range(4))))
            step = step.lower(*given, segments)
        text = step.compile().as_text()
        assert not re.search(r"\[[0-9,]*1024,1024\]", text)
        module = hlo.parse(text)
        found = [
            kernels.kernel_work(comp, call, 0.0, 1.0)
            for comp in module.computations.values()
            for call in comp.instructions
            if kernels.is_kernel(call)
        ]
        assert all(work.kind == "attention" and work.known for work in found)
        return sorted(work.flops for work in found)

    return make


@pytest.mark.parametrize(
    "sizes, heads, tiles",
    [
        # Of 4 x 4 tiles those on and below the diagonal.
        (dict(data=2, tensor=2), 1 * 2, 10),
        # The last shard's 2 x 4; keys of both come together.
        (dict(data=2, context=2), 1 * 4, 3 + 4),
    ],
)
def test_attention_compiled_for_a_mesh_of_tpus(splash_calls, sizes, heads, tiles):
    one = 2 * heads * tiles * 256 * 256 * 64
    assert splash_calls(**sizes) == [2 * one, 3 * one, 4 * one]


def test_a_window_leaves_tiles_out(splash_calls):
    """Values of 128 under keys of 192, a softcap and sinks: the kernel takes them all.

    A query sees 300 places: the tiles of its own block, and of one or two before.
    """
    scoring = Scoring(window=300, softcap=30.0)
    sizes = dict(data=2, tensor=2, width=192, values=128)
    tiles = 2 * 2 * (1 + 2 + 3 + 3) * 256 * 256
    by_widths = [192 + 128, 2 * 192 + 128, 2 * 192 + 2 * 128]
    assert splash_calls(scoring, **sizes) == [tiles * width for width in by_widths]


@pytest.mark.parametrize("names", [("bf16[8,512,128]",) * 2, ("bf16[8,512,128]",) * 3])
def test_tiles_of_attention_by_hand(work_of, names):
    """256 queries, the last of 512: of 2 x 4 tiles all but one are visited."""
    # A third result with heads is the gradient of the queries.
    results = ", ".join(["f32[128,128]", "f32[128,128]", *names])
    metadata = r'{"xprof_metadata":"{\"block_q_dkv\": 128, \"block_kv_dkv\": 128}"}'
    lines = f"""
    %tables = s8[1,2,4] parameter(0)
    %q = bf16[8,256,128] parameter(1)
    %k = bf16[2,512,128] parameter(2)
    ROOT %splash_mha_dkv.4 = ({results}) custom-call(%tables, %q, %k), {CALL}, \
        frontend_attributes={{kernel_metadata={metadata}}}
    """
    found = work_of(lines.replace("\\\n        ", ""))
    products = 2 + len(names)
    assert found.flops == 2 * products * 8 * 7 * 128 * 128 * 128
    # Each tile reads queries and their gradient.
    assert found.hbm_bytes == 77 + 8 * 7 * 2 * (128 * 128 * 2)


def test_an_unknown_kernel_says_so(work_of):
    lines = f"""
    %x = bf16[8,128] parameter(0)
    ROOT %my_kernel.12 = bf16[8,128] custom-call(%x), {CALL}
    """
    expected = kernels.KernelWork("my_kernel", 0.0, 77.0, known=False)
    assert work_of(lines) == expected


def test_other_custom_calls_are_no_kernels(main_of):
    _, main = main_of("""
    ROOT %a = bf16[8,128] custom-call(), custom_call_target="AllocateBuffer"
    """)
    assert not kernels.is_kernel(main.root)
