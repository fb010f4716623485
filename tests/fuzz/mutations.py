"""Valid files, changed: what a fuzzer of this project gives to its readers."""

import copy
import json
import os

import hypothesis
from hypothesis import strategies as st

# Inputs of each test: a few by default, 10,000 by hand (see docs/security.md).
EXAMPLES = int(os.environ.get("MOE_JAX_FUZZ_EXAMPLES", "0"))

NUMBERS = [0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30]
FLOATS = [0.5, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 1.0]
TEXTS = [
    "",
    " ",
    "x",
    "..",
    "../x",
    "/etc/passwd",
    "a/../../b",
    "~",
    "\0",
    "\ud800",
    "\u202e\U0001f600",
    "é" * 300,
    "moe_jax",
    "moe_jax.config.Config",
    "moe_jax.config.MeshConfig",
    "os.system",
    "float32",
    "bfloat16",
    "NaN",
    "1e999",
    "-1",
    "%s%n{0}",
    "__class__",
]
VALUES = st.one_of(
    st.sampled_from([None, True, False, *NUMBERS]),
    st.sampled_from(FLOATS),
    st.sampled_from(TEXTS),
    st.sampled_from([[], {}, [[]], [None], {"": 0}, [1, 2, 3], {"class": 1}]),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)


HARD_JSON = [
    b"",
    b"null",
    b"\xff",
    b"[" * 100_000,
    b"[" * 500 + b"]" * 500,
    b'{"a":' * 50_000,
    b"1" * 10_000,
]


def settings(few: int):
    """As many inputs as the environment says; few where it says nothing."""
    return hypothesis.settings(
        max_examples=EXAMPLES or few,
        deadline=None,
        database=None,
        derandomize=not EXAMPLES,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate],  # Shrinking a file takes minutes.
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def _places(value, found):
    """All (container, key) below a JSON value."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            found.append((value, key))
            _places(value[key], found)
    return found


@st.composite
def json_values(draw, base, most=3):
    """The value with up to `most` changes, each at any depth of it."""
    value = {"": copy.deepcopy(base)}
    for _ in range(draw(st.integers(1, most))):
        places = _places(value, [])
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.integers(0, 7))
        if kind == 0 and holder is not value:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict) and holder is not value:
            holder[draw(st.sampled_from(TEXTS))] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], dict):
            holder[key][draw(st.sampled_from(TEXTS))] = copy.deepcopy(draw(VALUES))
        elif kind == 3:  # What stands elsewhere.
            other, at = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = copy.deepcopy(other[at]) if at in _keys(other) else None
        elif kind == 4 and isinstance(holder[key], int):
            holder[key] += draw(st.sampled_from([-1, 1, 2, 1000, 2**32]))
        else:
            holder[key] = copy.deepcopy(draw(VALUES))
    return value[""]


def _keys(holder):
    return holder if isinstance(holder, dict) else range(len(holder))


@st.composite
def byte_strings(draw, base, most=4):
    """The bytes with up to `most` flips, cuts, insertions and repeats."""
    value = bytearray(base)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(value) - 1)))
        if draw(st.booleans()):  # Heads are where readers can be misled.
            at %= 64
        kind = draw(st.integers(0, 5))
        if kind == 0 and value:
            value[min(at, len(value) - 1)] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1 and value:
            odd = st.sampled_from([0, 1, 127, 128, 255])
            value[min(at, len(value) - 1)] = draw(odd)
        elif kind == 2:
            del value[at:]
        elif kind == 3:
            value[at:at] = draw(st.binary(max_size=16))
        elif kind == 4:
            value[at : at + 8] = draw(
                st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7])
            )
        else:
            value += value[at : at + 64]
    return bytes(value)


@st.composite
def json_files(draw, base):
    """The text of a JSON file whose value, or whose bytes, are changed."""
    if draw(st.integers(0, 3)):
        text = json.dumps(draw(json_values(base)), ensure_ascii=draw(st.booleans()))
        return text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(HARD_JSON))
    return draw(byte_strings(json.dumps(base).encode()))
