"""Torch checkpoints become safetensors files."""

import argparse
import builtins
import os

import ml_dtypes
import numpy as np
import pytest

from moe_jax.convert import pt_file, tensor_file
from moe_jax.errors import UserError


def test_without_torch_one_message(tmp_path, monkeypatch):
    plain = builtins.__import__

    def without(name, *rest, **named):
        if name == "torch":
            raise ImportError(name)
        return plain(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install torch"):
        pt_file.convert("a.pt", str(tmp_path / "b"))


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.fixture
def saved(tmp_path):
    torch = pytest.importorskip("torch")
    path, rng = tmp_path / "last.pt", torch.Generator().manual_seed(0)
    one = torch.randn(3, 4, generator=rng)
    weights = {
        "module.a.weight": one,
        "module.a.turned": one.T,
        "module.b": one.bfloat16(),
        "module.count": torch.tensor(7),
    }
    # As training scripts save it: flags beside the tensors.
    flags = argparse.Namespace(lr=1e-4)
    torch.save({"ema": weights, "opt": {"step": 3}, "args": flags}, path)
    return path, weights


def test_a_dict_inside(saved, tmp_path):
    path, weights = saved
    out, said = tmp_path / "new" / "model.safetensors", []
    given = dict(key="ema", prefix="module.", say=said.append)
    pt_file.convert(str(path), str(out), **given)
    assert said == [f"{out}: 4 tensors, {48 + 48 + 24 + 8} bytes"]
    found = tensor_file.read_header(str(out))
    kinds = {n: (t.type_name, t.shape) for n, t in found.items()}
    assert kinds == {
        "a.weight": ("F32", (3, 4)),
        "a.turned": ("F32", (4, 3)),
        "b": ("BF16", (3, 4)),
        "count": ("I64", ()),
    }
    for name in ("a.weight", "a.turned"):
        want = weights[f"module.{name}"].numpy()
        np.testing.assert_array_equal(found[name].array(), want)
    want = weights["module.a.weight"].numpy().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["b"].array(), want)
    assert os.listdir(out.parent) == ["model.safetensors"]


def test_what_is_refused(saved, tmp_path):
    torch = pytest.importorskip("torch")
    path, weights = saved
    out = str(tmp_path / "model.safetensors")

    def refused(words, path=path, **given):
        with pytest.raises(UserError, match=words):
            pt_file.convert(str(path), out, say=print, **given)
        assert not os.path.exists(out)

    refused("several dicts; choose one by --key=ema .*: ema, opt", key="")
    refused(
        r"--key=emma: .* has none, did you mean|--key=emma: .* has none", key="emma"
    )
    refused("step is a int, no tensor", key="opt")
    refused("is no dict of tensors", key="args")
    refused("'module.a.weight', without it", key="ema", prefix="ema.")
    refused("no such file", path=tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    refused("is no checkpoint of torch", path=tmp_path / "text.pt")
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    refused("holds what is neither tensor nor plain value", path=tmp_path / "evil.pt")
    torch.save({"a": weights["module.b"].to(torch.complex64)}, tmp_path / "odd.pt")
    refused("a is of type torch.complex64", path=tmp_path / "odd.pt")
