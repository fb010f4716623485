"""Eight fake devices, and what the tests of checkpoints share."""

# ruff: noqa: I001
import moe_jax  # Before jax: it sizes the thread pool of the CPU client.
import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

if jax.config.jax_num_cpu_devices != 8:
    with contextlib.suppress(RuntimeError):  # Another folder's tests began before.
        jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def mesh_of():
    """`mesh_of((2, 4))` has axes `a` and `b`; Explicit axes unless told otherwise."""

    def make(shape, axis_type=AxisType.Explicit):
        devices = jax.devices()[: int(np.prod(shape))]
        names = ("a", "b")[: len(shape)]
        return jax.make_mesh(
            shape, names, axis_types=(axis_type,) * len(shape), devices=devices
        )

    return make


@pytest.fixture(scope="session")
def placed():
    """Puts each array of a tree on a mesh, its first dimension split over `a`."""

    def put(tree, mesh):
        def one(x):
            split = np.ndim(x) and np.shape(x)[0] % mesh.shape["a"] == 0
            spec = P("a") if split and np.size(x) else P()
            return jax.device_put(x, NamedSharding(mesh, spec))

        return jax.tree.map(one, tree)

    return put


@pytest.fixture(scope="session")
def abstract():
    """The restore target that looks like a tree of arrays."""

    def make(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
        )

    return make


@pytest.fixture(scope="session")
def same_bits():
    """Whether two trees have the same structure and the same bits."""

    def compare(a, b):
        return jax.tree.structure(a) == jax.tree.structure(b) and all(
            x.dtype == y.dtype
            and x.shape == y.shape
            and np.asarray(x).tobytes() == np.asarray(y).tobytes()
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )

    return compare


@pytest.fixture(scope="session")
def python():
    """Starts `python ARGUMENTS` with this package on its path, output piped."""
    root = str(pathlib.Path(moe_jax.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    return start
