"""`moe-jax bench skew`: what it prints and writes, its status, mistakes of its user."""

import json

import jax
import pytest

from moe_jax import config
from moe_jax.bench import patterns
from moe_jax.cli import common, main
from moe_jax.cli.bench import layers
from moe_jax.cli.bench import skew as command
from moe_jax.moe.dispatch import DISPATCHES, gather
from moe_jax.moe.dispatch.gather import Gather

TINY = ["--tokens=64", "--d_model=8", "--d_ff=8", "--num_experts=8", "--repeats=2"]


@pytest.fixture
def run(capsys):
    """Runs the command on a tiny layer; returns status, stdout and stderr."""

    def call(*argv):
        status = main.main(["bench", "skew", *TINY, *map(str, argv)])
        return status, *capsys.readouterr()

    return call


pytestmark = pytest.mark.usefixtures("quick_compilation")


@config.node
class Mine(config.DispatchConfig):
    """A dispatch that a contributor wrote."""


def test_the_table_and_the_figures(run, tmp_path):
    path = tmp_path / "skew.json"
    status, out, err = run(
        "--dispatch=Bucket,gather",
        "--pattern=uniform,one_expert",
        "--mesh=data=2,expert=2",
        "--mesh=expert=4",
        "--capacity_factor=1",
        f"--json={path}",
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "64 tokens, top 2 of 8 experts, d_model 8, d_ff 8, float32"
    assert lines[1] == "mesh data=2 expert=2: 4 fake CPU devices"
    assert "not how fast an accelerator is" in lines[2]
    assert "mesh expert=4: 4 fake CPU devices" in lines
    assert "Bucket(capacity_factor=1.0, drop='position')" in out
    assert out.count("one_expert: fullest expert 8.0 x the mean, fullest shard") == 2
    assert lines[-1] == "passed: all 8 equal the oracle on what they served"
    first, second = json.loads(path.read_text())
    assert first["mesh"]["data"] == 2 and second["mesh"]["expert"] == 4
    assert first["platform"] == "cpu" and first["layer"]["d_ff"] == 8
    assert [d["name"] for d in first["dispatches"]] == ["Bucket", "Gather"]
    assert all(d["temporary_bytes"] > 0 for d in first["dispatches"])
    rows = first["rows"] + second["rows"]
    assert [(r["pattern"], r["dispatch"]) for r in rows] == [
        (pattern, kind)
        for pattern in ("uniform", "one_expert") * 2
        for kind in ("Bucket", "Gather")
    ]
    # Of 16 tokens of a shard a bucket of 8 holds one half; a list has room for all.
    assert rows[6]["dropped"] == 32 and rows[7]["rounds"] == 1
    assert f"{32:>8} (50.0%)" in out
    last = lines[-4:-2]
    assert [line.split()[0] for line in last] == ["Bucket", "Gather"]
    assert [line.split()[3:5] for line in last] == [["1", "50.0%"], ["1", "0.0%"]]
    for row in rows:
        assert row["problem"] == "" and 0 < row["error"] < 1e-5
        assert len(row["seconds"]) == 2 and row["median_seconds"] > 0


def test_a_broken_dispatch_fails(run, monkeypatch, tmp_path):
    """All shards but the first forget a token; found by its registered name."""

    def forgetful(options, rows, routing, experts, axes):
        y, stats = gather.dispatch(Gather(), rows, routing, experts, axes)
        return y.at[0].multiply(jax.lax.axis_index(axes.expert) == 0), stats

    monkeypatch.setitem(DISPATCHES, Mine, forgetful)
    path = tmp_path / "skew.json"
    status, out, err = run(
        "--dispatch=mine,gather",
        "--pattern=balanced",
        "--mesh=expert=2",
        f"--json={path}",
    )
    assert (status, err) == (1, "")
    assert "WRONG: differs in output" in out
    assert out.splitlines()[-1] == "FAILED: 1 of 2, of Mine"
    mine, other = json.loads(path.read_text())[0]["rows"]
    assert mine["errors"]["output"] > 0.1 and "output" in mine["problem"]
    assert other["problem"] == ""


def with_flags(body, *argv):
    """What `body` returns where the command's flags are set."""
    seen = []

    def read():
        seen.append(body())

    assert common.execute(read, command.define_flags, list(argv), "bench skew") == 0
    return seen[0]


def test_a_new_dispatch_is_compared_without_being_named(monkeypatch):
    monkeypatch.setitem(DISPATCHES, Mine, gather.dispatch)
    kinds, left_out = with_flags(layers.dispatches)
    names = [type(options).__name__ for options in kinds]
    exact = ["Exact", "Ragged", "Gather", "Ring"]
    assert names == ["Einsum", "Bucket", *exact, "Auto", "Mine"]
    assert left_out == []
    kinds, left_out = with_flags(layers.dispatches, "--capacity_factor=2")
    assert [type(options).__name__ for options in kinds] == names[:-2]
    assert all(options.capacity_factor == 2 for options in kinds)
    assert left_out == ["left out: Auto, Mine: no capacity_factor to set"]


def test_defaults():
    assert with_flags(command._patterns) == list(patterns.PATTERNS)
    mesh = with_flags(lambda: layers.default_mesh(8), "--num_experts=12")
    assert mesh == config.MeshConfig(expert=4, data=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dispatch=exat"], "'exat' is not a dispatch; did you mean 'exact'? (dis"),
        (["--pattern=zipff"], "'zipff' is not a pattern; did you mean 'zipf'? (patte"),
        (["--pattern="], "--pattern: '' is not a pattern (patterns: balanced, uniform"),
        (["--dispatch=exact,"], "--dispatch: '' is not a dispatch"),
        (["--mesh=expret=2"], "--mesh=expret=2: no axis 'expret'; did you mean 'expe"),
        (["--mesh=expert=3"], "--tokens=64 is not divisible by data * fsdp * expert"),
        (
            ["--mesh=expert=3", "--tokens=66"],
            "--num_experts=8 is not divisible by expert = 3 of the mesh; set it to a "
            "multiple of 3",
        ),
        (
            ["--mesh=tensor=3"],
            "--d_ff=8 is not divisible by tensor = 3 of the mesh; set it to a mul",
        ),
        (["--mesh=expert=2", "--mesh=fsdp=3", "--tokens=66"], "--d_model=8 is not di"),
        (["--top_k=9"], "--top_k=9 is more than --num_experts=8: the experts of a tok"),
        (["--top_k=0"], "top_k"),
        (["--repeats=0"], "repeats"),
        (["--capacity_factor=-1"], "capacity_factor"),
        (["--capacity_factor=nan"], "--capacity_factor=nan: must be a number"),
        (
            ["--capacity_factor=1", "--dispatch=exact,auto"],
            "--capacity_factor=1.0: Auto has none; leave out one of them",
        ),
        (["--dtype=float16"], "dtype"),
        (["--tokns=8"], "--tokns: no such flag; did you mean --tokens?"),
        (["zipf"], "unexpected argument 'zipf'"),
        (["--devices=4", "--mesh=expert=8"], "--devices=4, but --mesh needs 8: leave "),
        (["--json=/no/folder/skew.json"], "--json=/no/folder/skew.json cannot be wri"),
    ],
)
def test_bad_input(run, flags, message):
    status, out, err = run(*flags)
    assert (status, out) == (2, "")
    assert err.startswith("moe-jax bench skew: error: ") and err.count("error: ") == 1
    assert message in err and "Traceback" not in err


def test_a_mesh_that_needs_more_devices_than_there_are(run, monkeypatch):
    """As on accelerators, of which no more can be made."""
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:2])
    status, out, err = run("--mesh=expert=4")
    assert (status, out) == (2, "")
    assert "--mesh needs 4 devices, but there are 2 of kind 'cpu'; --devices=4" in err


def test_the_group_without_a_name_and_with_a_wrong_one(capsys):
    assert main.main(["bench"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage: moe-jax bench NAME" in err
    assert "  bench skew " in err and "\n  train" not in err
    assert main.main(["bench", "--help"]) == 0
    assert "  bench skew " in capsys.readouterr().out
    assert main.main(["bench", "skwe"]) == 2
    err = capsys.readouterr().err
    assert "'bench skwe' is not a command; did you mean 'bench skew'?" in err
    assert main.main(["bench", "skew", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("moe-jax bench skew: ") and "--capacity_factor=..." in out
    for name in patterns.PATTERNS:
        assert f"{name}," in out or f"{name}." in out
