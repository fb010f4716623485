"""Checkpoints of DiT and DiT-MoE against torch: predictions, losses, gradients.

The reference is written for this test from the published equations, on the tensors'
own names: what an import turns, splits or stacks is not in it.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from test_dit_files import CLASSES, LAYERS, SIDE, C, D, E, H, positions, tensors

from moe_jax.convert import load, mapping, tensor_file, to_dit
from moe_jax.convert.dit import table
from moe_jax.convert.from_dit import read
from moe_jax.models.base import ImageInputs
from moe_jax.models.dit import DiTModel
from moe_jax.models.dit_config import DiT, mlp
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.routing import EVAL
from moe_jax.moe.scorers.linear import Linear
from moe_jax.moe.selectors.top_k import TopK

ALPHA, K, B = 0.01, 2, 3
silu = torch.nn.functional.silu


class Reference:
    """A model of named tensors, images channels first."""

    def __init__(self, w, moe, flash):
        self.w, self.moe, self.flash = w, moe, flash
        self.losses, self.gaps = [], []

    def linear(self, name, x, bias=True):
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if bias else y

    def norm(self, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)

    def attention(self, at, x):
        names = ("Wqkv", "out_proj") if self.flash else ("qkv", "proj")
        joined = self.linear(f"{at}.{names[0]}", x)
        q, k, v = joined.reshape(*x.shape[:2], 3, H, D // H).permute(2, 0, 3, 1, 4)
        if self.flash:
            scale = lambda n: (self.w[f"{at}.{n}.weight"], self.w[f"{at}.{n}.bias"])
            (q_s, q_b), (k_s, k_b) = scale("q_norm"), scale("k_norm")
            q, k = self.norm(q) * q_s + q_b, self.norm(k) * k_s + k_b
        mixed = torch.softmax(q @ k.mT / (D // H) ** 0.5, dim=-1) @ v
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        return self.linear(f"{at}.{names[1]}", mixed)

    def unit(self, at, x):
        gate = silu(self.linear(f"{at}.gate_proj", x, bias=False))
        up = self.linear(f"{at}.up_proj", x, bias=False)
        return self.linear(f"{at}.down_proj", gate * up, bias=False)

    def mixture(self, at, x):
        rows = x.reshape(-1, D)
        probs = torch.softmax(self.linear(f"{at}.gate", rows, bias=False), dim=-1)
        weight, expert = torch.topk(probs, K, dim=-1)
        best = torch.sort(probs.detach(), descending=True).values
        self.gaps.append((best[:, K - 1] - best[:, K]).min().item())
        y = torch.zeros_like(rows)
        for e in range(E):
            given = (weight * (expert == e)).sum(dim=-1, keepdim=True)
            y = y + given * self.unit(f"{at}.experts.{e}", rows)
        shares = (
            torch.bincount(expert.reshape(-1), minlength=E).double() / expert.numel()
        )
        self.losses.append(ALPHA * E * (shares * probs.mean(dim=0)).sum())
        return (y + self.unit(f"{at}.shared_experts", rows)).reshape(x.shape)

    def feed_forward(self, at, x):
        if self.moe:
            return self.mixture(f"{at}.moe", x)
        hidden = self.linear(f"{at}.mlp.fc1", x)
        hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        return self.linear(f"{at}.mlp.fc2", hidden)

    def condition(self, time, label):
        speeds = torch.exp(-np.log(1e4) * torch.arange(128, dtype=time.dtype) / 128)
        angles = time[:, None] * speeds
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        hidden = silu(self.linear("t_embedder.mlp.0", waves))
        table = self.w["y_embedder.embedding_table.weight"]
        return self.linear("t_embedder.mlp.2", hidden) + table[label]

    def told(self, at, c, count):
        made = self.linear(f"{at}adaLN_modulation.1", silu(c))
        return made[:, None].chunk(count, dim=-1)

    def __call__(self, x, time, label):
        patch, bias = (self.w[f"x_embedder.proj.{n}"] for n in ("weight", "bias"))
        h = torch.nn.functional.conv2d(x, patch, bias, stride=2)
        h = h.flatten(2).mT + self.w["pos_embed"]
        c = self.condition(time, label)
        for i in range(LAYERS):
            at = f"blocks.{i}"
            shift, scale, gate, *rest = self.told(f"{at}.", c, 6)
            seen = self.norm(h) * (1 + scale) + shift
            h = h + gate * self.attention(f"{at}.attn", seen)
            shift, scale, gate = rest
            seen = self.norm(h) * (1 + scale) + shift
            h = h + gate * self.feed_forward(at, seen)
        shift, scale = self.told("final_layer.", c, 2)
        y = self.linear("final_layer.linear", self.norm(h) * (1 + scale) + shift)
        # (row, column) of the patch, then (row, column, channel) in it.
        y = y.reshape(B, SIDE // 2, SIDE // 2, 2, 2, 2 * C)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(B, 2 * C, SIDE, SIDE)


def model_of(moe, flash):
    ff = mlp(4 * D)
    if moe:
        ff = MoE(
            num_experts=E,
            experts=ExpertFeedForward(d_ff=4 * D),
            shared_d_ff=2 * D,
            scorer=Linear(dtype="float64"),
            selector=TopK(top_k=K, renormalize=False),
            dispatch=DenseDispatch(),
            balance=Balance(load_balance_weight=ALPHA, z_weight=0.0),
        )
    return DiTModel(
        DiT(
            image_size=SIDE, in_channels=C, patch_size=2, num_layers=LAYERS, d_model=D,
            num_heads=H, num_classes=CLASSES, feed_forward=ff, dtype="float64",
            param_dtype="float64", remat="none", qk_norm="layer" if flash else "none",
        )
    )  # fmt: skip


def mesh_of_one():
    return jax.sharding.Mesh(jax.devices()[:1], "x")


def imported(model, path):
    """Parameters from a file, on one device."""
    one = jax.sharding.NamedSharding(mesh_of_one(), jax.sharding.PartitionSpec())
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one)
    leaves = mapping.leaves_of(jax.tree.map(place, shapes), {})
    rows = table.parts(model.options, model.segments)
    wanted = mapping.places_of(rows, leaves, "DiT's files")
    return load.arrays(wanted, read(str(path)), leaves)[mapping.PARAMS]


def exported(model, params, path):
    """Arrays by the names of a file."""
    config = types.SimpleNamespace(model=model.options)
    parts = types.SimpleNamespace(config=config, model=model, mesh=mesh_of_one())
    to_dit.write(str(path), parts, mapping.leaves_of(params, {}))
    found = tensor_file.read_header(str(path))
    return {name: np.array(tensor.array()) for name, tensor in found.items()}


def ours(model, params, x, time, label):
    """The prediction, the loss of which gradients are taken, and each balance loss."""
    inputs = ImageInputs(x=jnp.asarray(x), time=jnp.asarray(time), label=label)
    state = model.init_router_state()

    def run(params):
        found = model.apply(params, state, inputs, key=None, mode=EVAL)
        told = found.aux.losses["load_balance_loss"] if found.aux else jnp.zeros(0)
        loss = jnp.mean(found.prediction**2) + jnp.sum(told)
        return loss, (found.prediction, told)

    (_, (prediction, told)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(
        params
    )
    return prediction, told, grads


# With experts or not; with norms of queries and keys, whose attention has other names.
KINDS = {"dense": (False, False), "experts and norms": (True, True)}


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_losses_and_gradients(float64, tmp_path, kind):
    given = {n: v.astype(np.float64) for n, v in tensors(*KINDS[kind]).items()}
    given["pos_embed"] = positions()
    tensor_file.save(str(tmp_path / "there.safetensors"), given)
    rng = np.random.default_rng(8)
    x = rng.normal(size=(B, SIDE, SIDE, C))
    time, label = np.array([0.0, 500.0, 999.0]), np.array([4, CLASSES, 0])

    weights = {n: torch.tensor(v, requires_grad=True) for n, v in given.items()}
    there = Reference(weights, *KINDS[kind])
    images = torch.tensor(x).permute(0, 3, 1, 2)
    want = there(images, torch.tensor(time), torch.tensor(label))
    (want.pow(2).mean() + sum(there.losses)).backward()
    assert all(gap > 1e-4 for gap in there.gaps), "a tie: draw other weights"

    model = model_of(*KINDS[kind])
    params = imported(model, tmp_path / "there.safetensors")
    found, told, grads = ours(model, params, x, time, jnp.asarray(label))
    want = want.detach().permute(0, 2, 3, 1).numpy()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(found, want, atol=1e-10)
    losses = [loss.item() for loss in there.losses]
    np.testing.assert_allclose(told, losses, rtol=1e-10)
    named = exported(model, grads, tmp_path / "grads.safetensors")
    assert named.keys() == given.keys()
    for name, tensor in weights.items():
        if name == "pos_embed":
            continue  # Fixed here and there.
        grad = tensor.grad.numpy()
        error = np.linalg.norm(named[name] - grad)
        small = name.endswith("k_norm.bias")  # Softmax sees no shift of all keys.
        bound = 1e-8 * np.linalg.norm(grad) + 1e-12 * small
        assert error <= bound, name
        assert small or np.abs(grad).max() > 1e-7, name
