"""`moe-jax bench step|layer|data|compile` on tiny sizes: tables, figures, mistakes."""

import json
import pathlib

import jax
import pytest

from moe_jax.cli import main

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def run(capsys, tmp_path):
    """Runs a command with --json; returns status, stdout, stderr and the figures."""

    def call(name, *argv):
        path = tmp_path / f"{name}.json"
        given = ["bench", name, *map(str, argv), f"--json={path}"]
        status = main.main(given)
        figures = json.loads(path.read_text()) if path.exists() else None
        return status, *capsys.readouterr(), figures

    return call


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Flags for the tiny config, with one layer, on one device and 10,000 bytes."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: some words\n" for i in range(500)))
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    return [
        f"--config={TINY}",
        "--config.mesh.expert=1",
        "--config.model.num_layers=1",
        f"--config.data.source.path={text}",
        f"--config.data.folder={tmp_path}",
    ]


def test_step(run, config):
    flags = [*config, "--steps=3", "--warm_up=1", "--calls=2"]
    status, out, err, found = run("step", *flags)
    assert (status, err) == (0, "")
    assert "mesh of one" in out and "256 tokens a step" in out
    assert found["tokens"] == 8 * 32 and found["mfu"] is None
    assert set(found["compile_seconds"]) == {"trace", "lower", "compile"}
    assert len(found["step"]["seconds"]) == len(found["waiting"]["seconds"]) == 3
    assert len(found["dispatch"]["seconds"]) == len(found["bare"]["seconds"]) == 2
    assert found["losses"][1] < found["losses"][0], "it trains"
    # Batches have five arrays; the state comes back and metrics come out.
    into, back = found["leaves"]
    assert back > into - 5 > 20
    assert found["machine"]["jax"] == jax.__version__


def test_compile_here(run, config):
    status, out, err, found = run("compile", *config, "--repeats=1")
    assert (status, err) == (0, "") and "for 1 x 'cpu'" in out
    assert list(found["seconds"]) == ["trace", "lower", "compile", "total"]
    one = [found["seconds"][name]["seconds"][0] for name in found["seconds"]]
    assert one[3] == pytest.approx(sum(one[:3])) and min(one) > 0
    assert found["peak_host_bytes"] >= found["peak_host_bytes_before"] > 2**26


def test_data(run, config):
    flags = ["--lengths=16,32", "--tokens=4096", "--repeats=2"]
    status, out, err, found = run("data", *config, *flags)
    assert (status, err) == (0, "") and "text to token file" in out
    assert found["text"]["tokens"] > 9000
    assert [row["sequence_length"] for row in found["token_file"]] == [16, 32]
    for row in found["token_file"]:
        assert row["tokens"] == 4096 and row["batch_size"] in (16, 8)
        assert list(row["seconds"]) == ["rows", "ahead", "placed"]


def test_layer(run):
    sizes = ["--tokens=64", "--d_model=8", "--d_ff=8", "--num_experts=8", "--repeats=2"]
    mesh = ["--mesh=expert=2", "--dispatch=exact,gather"]
    status, out, err, (found,) = run("layer", *sizes, *mesh)
    assert (status, err) == (0, "")
    # 128 rows, three matrices of 8 x 8, three passes, two FLOPs.
    assert found["useful_flops"] == 128 * 64 * 18
    assert list(found["dispatches"]) == ["Exact", "Gather"]
    dense = 128 * 64 * 2 / found["dense"]["median"]
    assert found["dense_flops_per_second"] == pytest.approx(2 * dense)
    rate = found["useful_flops"] / found["dispatches"]["Exact"]["median"]
    line = next(line for line in out.splitlines() if line.startswith("Exact"))
    assert line.split()[-1] == f"{rate / (2 * dense):.1%}"


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("data", ["--lengths=16,no"], "--lengths=16,no: numbers of 1 or more"),
        ("data", ["--lengths=512", "--tokens=1000000"], "the text has 19 rows"),
        ("compile", ["--slices=2"], "--slices belongs to --topology"),
        ("compile", ["--topology=v9:4"], "is not a topology"),
    ],
)
def test_mistakes(run, config, name, flags, message):
    status, _, err, found = run(name, *config, *flags)
    assert status == 2 and message in err and found is None


def test_the_default_config_is_that_of_the_checkout(run):
    status, _, err, _ = run("step", "--config.mesh.expert=3")
    assert status == 2 and "num_experts=16 is not divisible" in err
