"""The command `plan`: mistakes of its user, what it prints and writes, its status."""

import json
import pathlib

import jax
import pytest

from moe_jax.cli import common, plan
from moe_jax.plan import memory, report

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"


@pytest.fixture
def run(capsys, compile_anew):
    """Runs the command on the tiny config; returns status, stdout and stderr."""

    def call(*argv):
        argv = [f"--config={TINY}", *map(str, argv)]
        with compile_anew():
            status = common.execute(plan.main, plan.define_flags, argv, "plan")
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def fails(run):
    """Runs the command, which must fail; returns its message."""

    def call(*argv):
        status, out, err = run(*argv)
        assert (status, out) == (2, ""), err
        assert err.startswith("moe-jax plan: error: ") and err.count("error: ") == 1
        assert "Traceback" not in err
        return err

    return call


@pytest.fixture
def planned(monkeypatch):
    """Puts a plan that allocates so much in the place of a compilation."""

    def stand_in(allocated, capacity, refused=False):
        found = report.Plan(
            topology="v5e:2x4",
            slices=1,
            num_chips=8,
            num_devices=8,
            mesh={"data": 4, "expert": 2},
            compiler="none",
            compile_seconds=0.0,
            capacity_bytes=capacity,
            host_bytes=0,
            memory=memory.Memory(
                allocated // 2, allocated, {"parameters": allocated // 2}, ()
            ),
            compiler_peak_bytes=None,
            refused=refused,
            tokens=256,
            model_flops=1e6,
            peak_flops=0.0,
            step=None,
        )
        monkeypatch.setattr(report, "make_plan", lambda *args, **kwargs: found)

    return stand_in


def test_a_missing_topology(fails):
    message = fails()
    assert "--topology is missing: KIND:SHAPE" in message and "v5e:4x4" in message


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--topology=v5e"],
            "--topology='v5e' is not a topology: it is not KIND:SHAPE",
        ),
        (["--topology=cpu:8", "--slices=2"], "--slices=2: cpu:8 has no slices"),
        (["--topology=cpu:8", "--slices=0"], "--slices"),
        (["--topolgy=cpu:8"], "--topolgy: no such flag; did you mean --topology?"),
        (
            [
                "--topology=cpu:8",
                "--config.mesh.data=8",
                "--config.train.batch_size=16",
            ],
            "--config.mesh needs 16 devices (data=8 * fsdp=1 * expert=2 * context=1 * "
            "tensor=1) but there are 8",
        ),
        (
            [
                "--topology=cpu:8",
                "--config.mesh.data=-1",
                "--config.train.batch_size=4",
            ],
            "= 4 rows cannot be split over 8 shards (data * fsdp * expert on 8",
        ),
        (
            ["--topology=cpu:8", "--search", "--loop_passes=2"],
            "--search takes neither --dump-hlo nor --loop_passes",
        ),
        (["--topology=cpu:8", "--quick"], "--quick and --loop_passes are for TPUs"),
        (["--topology=cpu:8", "--loop_passes=1"], "--loop_passes are for TPUs"),
        (["--topology=cpu:8", "--workers=3"], "--workers belongs to --search"),
        (["--topology=cpu:8", "--search", "--quick"], "leave out --quick"),
    ],
)
def test_mistakes(fails, flags, message):
    assert message in fails(*flags)


def test_topologies_that_libtpu_refuses(fails):
    pytest.importorskip("libtpu")
    message = fails("--topology=v6e:3x3")
    assert "--topology='v6e:3x3' is not a topology: " in message
    assert "KIND one of v2|v3|v4|v5e|v5p|v6e|tpu7x" in message


def test_a_folder_in_use(fails, tmp_path):
    (tmp_path / "file").touch()
    options = ["--topology=cpu:8", "--config.mesh.data=-1"]
    assert "is not empty" in fails(*options, f"--dump-hlo={tmp_path}")


def test_figures_that_cannot_be_written(run, planned, tmp_path):
    planned(allocated=10, capacity=20)
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "plan.json"
    status, _, err = run("--topology=cpu:8", f"--json={path}")
    assert status == 2 and err.count("error: ") == 1
    assert f"--json={path} cannot be written" in err


@pytest.mark.parametrize(
    "allocated, capacity, status, words",
    [
        (3 * 10**9, 4 * 10**9, 0, "3.000 allocated of 4.00: fits, 1.00 GB to spare"),
        (4 * 10**9, 4 * 10**9, 0, "fits"),
        (6 * 10**9, 4 * 10**9, 1, "DOES NOT FIT, 2.00 GB too much"),
        (6 * 10**9, None, 0, "by the host's compiler"),
    ],
)
def test_status_says_whether_it_fits(run, planned, allocated, capacity, status, words):
    planned(allocated, capacity)
    found, out, err = run("--topology=cpu:8")
    assert (found, err) == (status, "")
    assert words in out


def test_what_the_compiler_refuses_does_not_fit(run, planned):
    # By our own count there would be room.
    planned(3 * 10**9, 4 * 10**9, refused=True)
    status, out, _ = run("--topology=cpu:8")
    assert status == 1
    assert "DOES NOT FIT, says the compiler" in out


@pytest.mark.slow
def test_memory_by_the_host_s_compiler(run, tmp_path):
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        status, out, err = run(
            "--topology=cpu:8",
            "--config.mesh.data=2",
            "--config.mesh.fsdp=2",
            "--config.model.num_layers=1",
            f"--json={tmp_path / 'plan.json'}",
            f"--dump-hlo={tmp_path / 'dump'}",
        )
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert status == 0, err
    assert "cpu:8: 8 chips, mesh data=2 fsdp=2 expert=2" in out
    assert "Time and collectives need a TPU topology" in out
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["step"] is None and figures["fits"] is None
    assert sum(figures["memory"].values()) == figures["peak_bytes"] > 0
    for kind in figures["memory"]:
        assert f"  {kind} " in out
    assert list((tmp_path / "dump").glob("*jit_train_step*buffer-assignment.txt"))
