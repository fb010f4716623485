"""Options of the compiler: those of the chip, and the user's own before them."""

from moe_jax.parallel import compiler

GATHERS = "xla_tpu_enable_sparse_core_collective_offload_all_gather"


def test_chips_with_sparse_cores_send_beside_their_work():
    for kind in ("TPU v5", "TPU v6 lite"):
        assert compiler.options(kind)[GATHERS] == "true"
    for kind in ("TPU v5 lite", "cpu", "NVIDIA H200"):
        assert compiler.options(kind) == {}


def test_own_options_go_before():
    own = f"{GATHERS}=false xla_a=b=c"
    found = compiler.options("TPU v5", own)
    assert (found[GATHERS], found["xla_a"]) == ("false", "b=c")
    assert GATHERS not in compiler.options("TPU v5", f"{GATHERS}=")
    assert compiler.options("cpu", "xla_a=1") == {"xla_a": "1"}
