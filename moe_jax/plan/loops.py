"""How often a loop runs, where the program says so.

A counted loop compares one element of its state, the counter, with a limit; the
counter begins at a constant and grows by another. XLA writes the comparison or the
addition into a fusion at times. A loop that waits for data has no such form.
"""

import math
import re

from moe_jax.plan.hlo import Computation, Instruction, Module

_TRANSPARENT = ("copy", "bitcast", "convert", "reshape")


def trip_count(module: Module, outer: Computation, loop: Instruction) -> int | None:
    """Passes of a `while` in `outer`; None where they depend on data."""
    known = re.search(r"known_trip_count\D+(\d+)", loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.reference("condition")]
    body = module.computations[loop.reference("body")]
    compared = _comparison(module, condition)
    if compared is None:
        return None
    counter, limit, direction = compared
    if _element(condition, counter) is None:
        return None
    inits = _through(outer, outer.by_name.get(loop.operands[0]))
    step = _step(module, body, counter.index, inits, outer)
    begin = _initial(outer, inits, counter.index)
    end = _constant(condition, limit)
    if end is None and _element(condition, limit) is not None:
        if _changes(body, limit.index):
            return None
        end = _initial(outer, inits, limit.index)
    if begin is None or end is None or not step or direction == "EQ":
        return None
    if direction in ("LE", "GE"):
        end += 1 if step > 0 else -1
    return max(0, math.ceil((end - begin) / step))


def _element(comp: Computation, value: Instruction | None) -> int | None:
    """Which element of the state it is; None for all else."""
    if value is None or value.opcode != "get-tuple-element":
        return None
    state = comp.by_name[value.operands[0]]
    return value.index if state.opcode == "parameter" else None


def _through(comp: Computation, value: Instruction | None) -> Instruction | None:
    """The value behind copies and conversions."""
    while value is not None and value.opcode in _TRANSPARENT:
        value = comp.by_name.get(value.operands[0])
    return value


def _constant(comp: Computation, value: Instruction | None) -> int | None:
    value = _through(comp, value)
    if value is None or value.opcode != "constant":
        return None
    match = re.match(r"\s*(-?\d+)\s*$", value.arguments)
    return int(match[1]) if match else None


def _comparison(module: Module, condition: Computation):
    """(counter, limit, direction) of the condition, all seen from outside a fusion."""
    root, place = condition.root, condition
    inside = root
    if root.opcode == "fusion":
        place = module.computations[root.reference("calls")]
        inside = place.root
    if inside.opcode != "compare":
        return None
    sides = []
    for name in inside.operands:
        value = _through(place, place.by_name.get(name))
        if value is not None and value.opcode == "parameter" and place is not condition:
            value = condition.by_name.get(root.operands[value.index])
        elif value is not None and value.opcode == "constant":
            sides.append(value)
            continue
        sides.append(_through(condition, value))
    if len(sides) != 2 or None in sides:
        return None
    return sides[0], sides[1], inside.reference("direction")


def _initial(outer: Computation, inits: Instruction | None, index: int) -> int | None:
    if inits is None or inits.opcode != "tuple":
        return None
    return _constant(outer, outer.by_name.get(inits.operands[index]))


def _changes(body: Computation, index: int) -> bool:
    """Whether the body gives back another value than it got."""
    if body.root.opcode != "tuple":
        return True
    value = _through(body, body.by_name.get(body.root.operands[index]))
    return _element(body, value) != index


def _step(module, body, index, inits, outer) -> int | None:
    """What a pass adds to the counter; a constant, or an unchanged element."""
    if body.root.opcode != "tuple":
        return None
    place, value = body, _through(body, body.by_name.get(body.root.operands[index]))
    call = None
    if value is not None and value.opcode == "fusion":
        call, place = value, module.computations[value.reference("calls")]
        value = place.root
    if value is None or value.opcode != "add":
        return None
    terms = []
    for name in value.operands:
        term_place, term = place, _through(place, place.by_name.get(name))
        if call is not None and term is not None and term.opcode == "parameter":
            term_place = body
            term = _through(body, body.by_name.get(call.operands[term.index]))
        terms.append((term_place, term))
    for kept, added in (terms, terms[::-1]):
        if _element(*kept) != index:
            continue
        found, element = _constant(*added), _element(*added)
        if found is None and element is not None and not _changes(body, element):
            found = _initial(outer, inits, element)
        return found
    return None
