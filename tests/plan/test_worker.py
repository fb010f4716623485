"""Plans made in processes of their own, and what is kept of them."""

import copy
import json
import pathlib

import pytest

from moe_jax import config_json
from moe_jax.cli import config_file
from moe_jax.config import MeshConfig
from moe_jax.errors import RunError, UserError
from moe_jax.plan import report, topology, worker
from moe_jax.plan.worker import Request

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"


@pytest.fixture
def tiny():
    """4 experts, 4 heads, 2 of keys; 16 rows, on fsdp=2 and whatever remains."""
    config = config_file.load(str(TINY))
    config.train.batch_size = 16
    config.mesh = MeshConfig(fsdp=2)
    return config


def test_a_torn_file_of_the_cache_is_made_again(tiny, tmp_path):
    request = Request.of(tiny, "v5e:2x4")
    path = tmp_path / f"{worker.key(request)}.json"
    path.write_text('{"fits": tr')
    found = worker.plan(request, str(tmp_path), lambda r: {"fits": True})
    assert found == {"fits": True} == json.loads(path.read_text())


def test_a_plan_depends_on_config_topology_versions_and_source(tiny, monkeypatch):
    keys = {worker.key(Request.of(tiny, "v5e:2x4"))}
    assert worker.key(Request.of(copy.deepcopy(tiny), "v5e:2x4")) in keys
    keys.add(worker.key(Request.of(tiny, "v5e:4x4")))
    keys.add(worker.key(Request.of(tiny, "v5e:2x4", 2)))
    tiny.model.remat = "full"
    keys.add(worker.key(Request.of(tiny, "v5e:2x4")))
    monkeypatch.setattr(worker, "_source_hash", lambda: "another")
    keys.add(worker.key(Request.of(tiny, "v5e:2x4")))
    monkeypatch.setattr(worker, "_version", lambda package: "another")
    keys.add(worker.key(Request.of(tiny, "v5e:2x4")))
    assert len(keys) == 6


@pytest.mark.parametrize("error", [None, UserError("no"), RunError("broken")])
def test_the_worker_writes_a_plan_or_an_error(tiny, tmp_path, monkeypatch, error):
    class Plan:
        def to_json(self):
            return {"fits": False}

    def make_plan(config, where, quick):
        assert config_json.to_json(config) == config_json.to_json(tiny)
        assert where == ("v5e:2x4", 2)
        if error:
            raise error
        return Plan()

    monkeypatch.setattr(report, "make_plan", make_plan)
    monkeypatch.setattr(topology, "find", lambda name, slices: (name, slices))
    ask, out = tmp_path / "ask", tmp_path / "out"
    ask.write_text(json.dumps(vars(Request.of(tiny, "v5e:2x4", 2))))
    assert worker.main([str(ask), str(out)]) == 0
    expected = {"error": str(error)} if error else {"fits": False}
    assert json.loads(out.read_text()) == expected


def test_a_worker_that_dies_is_an_error_with_its_last_words(tiny, monkeypatch):
    monkeypatch.setattr(worker, "_MODULE", "moe_jax.no_such_module")
    found = worker.compile_apart(Request.of(tiny, "v5e:2x4"))
    assert "exit status 1" in found["error"] and "no_such_module" in found["error"]
