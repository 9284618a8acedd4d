"""What the JSON of a plan may say: known fields, numbers within bounds, before anything is built.

A plan decides how much is allocated and what bytes mean. So each field is checked first, and an
error names it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from lowtide.errors import BadInput
from lowtide.formats.kinds import KINDS

MOST_BITS = 8
MOST_CHANNELS = 2**20  # of a layer
MOST_STEPS = 2**14  # of a schedule
MOST_TICKS = 2**20
LAST_TIMESTEP = 2**31 - 1
SAME = 1.0  # ticks: how far a timestep may be from its unrounded value
BY_ROW = ("mixed", "stepped")  # kinds of formats with several bit-widths
NUMBERS = "0123456789"


def check_plan_fields(data: object) -> dict[str, Any]:
    """The fields of a plan, once it is known that `Plan.from_json` can read them."""
    plan = _mapping(data, "plan", "the plan")
    required = {"layers", "attentions", "timesteps", "ticks", "kinds", "left", "cached", "requests"}
    known = required | set(_CHECKS) | {"method", "summary", "example"}
    for name in (*sorted(required - plan.keys()), *sorted(plan.keys() - known)):
        word = "no" if name in required else "the unknown"
        raise _wrong(f"{word} field {name}", "the fields of its version")
    for name, check in _CHECKS.items():
        if name in plan:
            check(plan[name], name)
    _mapping(plan.get("summary", {}), "summary", "the settings of the run")
    _mapping(plan.get("example", {}), "example", "a recorded architecture")
    if not isinstance(plan.get("method", ""), str):
        raise _wrong(f"method {_shown(plan['method'])}", "the name of a method")
    _check_numbers(plan)
    _check_places(plan)
    _check_schedule(plan)
    return plan


def _wrong(found: str, expected: str) -> BadInput:
    return BadInput(
        f"found a plan with {found}", f"{expected}", "copy or download the checkpoint again"
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _mapping(value: object, name: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(f"{name} {_shown(value)}", f"{what} by name")
    return value


def _integer(value: object, name: str, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _wrong(f"{name} {_shown(value)}", f"a whole number from {least} to {most}")
    return value


def _sequence(value: object, name: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise _wrong(f"{name} {_shown(value)}", f"a list of at most {most}")
    return value


def _boolean(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise _wrong(f"{name} {_shown(value)}", "true or false")


def _check_timesteps(value: object, name: str) -> None:
    steps = _sequence(value, name, MOST_STEPS)
    for step in steps:
        _integer(step, name, 0, LAST_TIMESTEP)
    if len(set(steps)) != len(steps):
        raise _wrong(f"{name} {_shown(steps)}", "each timestep once")


def _check_times(value: object, name: str) -> None:
    for time in _sequence(value, name, MOST_STEPS):
        if not _is_number(time) or not abs(time) <= LAST_TIMESTEP:
            raise _wrong(f"{name} {_shown(time)}", f"numbers up to {LAST_TIMESTEP}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_kinds(value: object, name: str) -> None:
    for kind in _sequence(value, name, MOST_CHANNELS):
        _check_layer(kind, name)


def _check_layer(value: object, name: str) -> None:
    layer = _mapping(value, name, "formats of weights and inputs")
    expected = {"weight", "input", "per_step", "smooth"}
    if layer.keys() != expected:
        raise _wrong(f"{name} {_shown(sorted(layer))}", f"{', '.join(sorted(expected))}")
    for side, kinds in (("weight", ("affine", "mixed")), ("input", tuple(KINDS))):
        _check_format(layer[side], f"{name}.{side}", kinds)
    if layer["input"] and layer["input"]["kind"] == "mixed":
        raise _wrong(f"{name}.input of kind mixed", "a format of inputs")
    _boolean(layer["per_step"], f"{name}.per_step")
    _boolean(layer["smooth"], f"{name}.smooth")


def _check_format(value: object, name: str, kinds: Sequence[str]) -> None:
    if value is None:
        return
    form = _mapping(value, name, "a format")
    kind = form.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise _wrong(f"{name} of kind {_shown(kind)}", f"one of {', '.join(kinds)}")
    names = {each.name for each in fields(KINDS[kind])}
    if not {"bits"} <= form.keys() <= names | {"kind"}:
        raise _wrong(f"{name} {_shown(form)}", f"bits, and no more than {', '.join(sorted(names))}")
    _check_bits(form["bits"], f"{name}.bits", several=kind in BY_ROW)
    if "signed" in form:
        _boolean(form["signed"], f"{name}.signed")
    if form.get("group") is not None:
        _integer(form["group"], f"{name}.group", 1, MOST_CHANNELS)
    if form.get("axis") is not None:
        _integer(form["axis"], f"{name}.axis", 0, 0)
    if "axes" in form:
        _integer(form["axes"], f"{name}.axes", 1, MOST_BITS)


def _check_bits(value: object, name: str, *, several: bool) -> None:
    if not several:
        _integer(value, name, 1, MOST_BITS)
        return
    if isinstance(value, str):
        value = [NUMBERS.find(digit) for digit in value[: MOST_CHANNELS + 1]]
    for bits in _sequence(value, name, MOST_CHANNELS):
        _integer(bits, name, 1, MOST_BITS)


def _check_reasons(value: object, name: str) -> None:
    for reason, names in _mapping(value, name, "lists of layers").items():
        for each in _sequence(names, f"{name} {reason!r}", MOST_CHANNELS):
            if not isinstance(each, str):
                raise _wrong(f"{name} {_shown(each)}", "names of layers")


def _check_widths(value: object, name: str) -> None:
    for width in _mapping(value, name, "widths").values():
        _integer(width, name, 1, MOST_CHANNELS)


def _check_caches(value: object, name: str) -> None:
    for cache in _mapping(value, name, "caches").values():
        _check_cache(cache, name)


def _check_cache(value: object, name: str) -> None:
    cache = _mapping(value, name, "a width and a format")
    known = {"width", "format", "chunks", "computed", "kept"}
    if not {"width", "format"} <= cache.keys() <= known:
        raise _wrong(f"{name} {_shown(cache)}", f"{', '.join(sorted(known))}")
    width = _integer(cache["width"], f"{name}.width", 1, MOST_CHANNELS)
    chunks = _integer(cache.get("chunks", 1), f"{name}.chunks", 1, width)
    if width % chunks:
        raise _wrong(f"{name}.chunks {chunks}", f"a divisor of the width {width}")
    _check_format(cache["format"], f"{name}.format", ("affine",))
    for field in ("computed", "kept"):
        _boolean(cache.get(field, False), f"{name}.{field}")


def _check_requests(value: object, name: str) -> None:
    for request in _mapping(value, name, "what layers read").values():
        is_list = isinstance(request, list)
        fields = {"reads": request} if is_list else _mapping(request, name, "what it reads")
        if not is_list and fields.keys() != {"reads", "cache", "exact"}:
            raise _wrong(f"{name} {_shown(request)}", "reads, cache and exact")
        reads = _sequence(fields["reads"], f"{name}.reads", MOST_STEPS)
        if not all(isinstance(each, str) for each in reads):
            raise _wrong(f"{name}.reads {_shown(reads)}", "names of inputs")
        if not is_list:
            _check_cache(fields["cache"], f"{name}.cache")
        if fields.get("exact") is not None:
            _check_layer(fields["exact"], f"{name}.exact")


def _check_sides(value: object, name: str) -> None:
    for side in _mapping(value, name, "ranks").values():
        fields = _mapping(side, name, "a rank")
        if not {"rank"} <= fields.keys() <= {"rank", "bias"}:
            raise _wrong(f"{name} {_shown(side)}", "rank and bias")
        _integer(fields["rank"], f"{name}.rank", 1, MOST_CHANNELS)
        _boolean(fields.get("bias", False), f"{name}.bias")


def _check_layers(value: object, name: str) -> None:
    for number in _mapping(value, name, "numbers of formats").values():
        _integer(number, name, 0, MOST_CHANNELS)


def _check_attentions(value: object, name: str) -> None:
    for parts in _mapping(value, name, "parts of attentions").values():
        _check_layers(parts, name)


def _check_ticks(value: object, name: str) -> None:
    _integer(value, name, 1, MOST_TICKS)


def _check_corrected(value: object, name: str) -> None:
    _integer(value, name, 0, MOST_CHANNELS)


def _check_order(value: object, name: str) -> None:
    for place in _sequence(value, name, MOST_CHANNELS):
        _integer(place, name, 0, MOST_CHANNELS)


_CHECKS: Mapping[str, Callable[[object, str], None]] = {
    "timesteps": _check_timesteps,
    "times": _check_times,
    "ticks": _check_ticks,
    "kinds": _check_kinds,
    "layers": _check_layers,
    "attentions": _check_attentions,
    "order": _check_order,
    "left": _check_reasons,
    "splits": _check_widths,
    "blank": _check_widths,
    "corrected": _check_corrected,
    "cached": _check_caches,
    "requests": _check_requests,
    "sides": _check_sides,
}


def _check_numbers(plan: Mapping[str, Any]) -> None:
    """Each layer's number is that of a kind."""
    numbers = list(plan["layers"].values())
    for parts in plan["attentions"].values():
        numbers += parts.values()
    if numbers and max(numbers) >= (kinds := len(plan["kinds"])):
        raise _wrong(f"layers of kind {max(numbers)}", f"one of the {kinds} kinds")


def _check_places(plan: Mapping[str, Any]) -> None:
    """The order has each place once: those of the layers, then those of the parts."""
    if "order" not in plan:
        return
    layers = len(plan["layers"])
    parts = sum(map(len, plan["attentions"].values()))
    order = plan["order"]
    expected = [*range(layers), *range(parts)]
    if sorted(order[:layers]) + sorted(order[layers:]) != expected:
        raise _wrong(f"an order of {len(order)} places", f"{layers + parts} places, each once")


def _check_schedule(plan: Mapping[str, Any]) -> None:
    """Timesteps are the rounded times."""
    steps = plan["timesteps"]
    times = plan.get("times", [])
    if not times:
        return
    if len(times) != len(steps):
        raise _wrong(f"{len(times)} times", f"as many as timesteps ({len(steps)})")
    for step, time in zip(steps, times, strict=True):
        if abs(time * plan["ticks"] - step) > SAME:
            raise _wrong(f"times {time} at timesteps {step}", "the same timestep, rounded")
