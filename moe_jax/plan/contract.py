"""A performance contract: costs of a compiled step that may not grow unnoticed.

The compiler is deterministic, so a recorded cost changes only with the code, the
config or the versions.
"""

from typing import Any

TOLERANCE = 0.005  # Relative; one small buffer more is no regression.
_SCALARS = ("allocated_bytes", "executed_flops", "model_flops", "hbm_bytes")


def costs(plan: dict[str, Any]) -> dict[str, Any]:
    """What the contract holds of a plan, which is `report.Plan.to_json`.

    Returns:
      compiler: versions; topology; allocated_bytes, executed_flops, model_flops and
      hbm_bytes per device; collectives: {"kind over axes": [count, payload bytes]}.
    """
    found = {name: plan[name] for name in ("compiler", "topology", *_SCALARS)}
    found["collectives"] = {
        f"{row['kind']} over {','.join(row['axes'])}": [
            row["count"],
            row["payload_bytes"],
        ]
        for row in sorted(plan["collectives"], key=lambda r: (r["kind"], r["axes"]))
        if row["axes"]
    }
    return found


def differences(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """How `found` breaks the contract, a line each; [] where it holds.

    A cost that fell counts too: until it is recorded it could rise again unseen.
    """
    for name in ("compiler", "topology"):
        if recorded[name] != found[name]:
            return [
                f"{name}: recorded with {recorded[name]}, this is {found[name]}: the "
                "costs of the two cannot be compared"
            ]
    lines = [
        _change(name, recorded[name], found[name])
        for name in _SCALARS
        if _differs(recorded[name], found[name])
    ]
    before, after = recorded["collectives"], found["collectives"]
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            lines.append(f"{name}: gone ({_megabytes(before[name])} before)")
        elif name not in before:
            lines.append(f"{name}: new, {_megabytes(after[name])}")
        elif any(map(_differs, before[name], after[name])):
            was, now = _megabytes(before[name]), _megabytes(after[name])
            lines.append(f"{name}: {was} before, {now} now")
    return lines


def _differs(a: float, b: float) -> bool:
    return abs(a - b) > TOLERANCE * max(abs(a), abs(b))


def _change(name: str, before: float, after: float) -> str:
    ratio = after / before - 1
    word = "dearer" if ratio > 0 else "cheaper"
    return f"{name}: {before:.6g} before, {after:.6g} now, {ratio:+.1%} ({word})"


def _megabytes(row: list[float]) -> str:
    count, payload = row
    return f"{count} of {payload / 1e6:.2f} MB in all"
