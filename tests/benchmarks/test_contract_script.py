"""The script that holds compiled steps to recorded costs; nothing is compiled here."""

import importlib.util
import json
import pathlib
import sys

import pytest

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "contract.py"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run(costs, *arguments) -> status`; what is recorded lies in the folder given."""
    spec = importlib.util.spec_from_file_location("contract_script", PATH)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "FOLDER", tmp_path)

    def call(costs, *arguments):
        monkeypatch.setattr(script, "_costs", lambda name: {**COSTS, **costs})
        monkeypatch.setattr(sys, "argv", ["contract.py", *arguments])
        return script.main()

    return call


COSTS = json.loads((PATH.parent / "contract" / "sharded.json").read_text())
COSTS.pop("why")


def test_records_all_and_holds_them(run, tmp_path, capsys):
    assert run({}, "--update", "--why=a reason") == 0
    recorded = sorted(path.name for path in tmp_path.iterdir())
    assert recorded == ["accumulated.json", "sharded.json", "tensor.json"]
    assert json.loads((tmp_path / "tensor.json").read_text())["why"] == "a reason"
    assert run({}) == 0
    more = {"executed_flops": 2 * COSTS["executed_flops"]}
    assert run(more, "tensor") == 1
    assert "tensor: BROKEN" in capsys.readouterr().out


def test_a_record_needs_a_reason(run):
    with pytest.raises(SystemExit):
        run({}, "--update")
