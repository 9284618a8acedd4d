"""Results as lines of text for a terminal, in sentences that need no documentation."""

import statistics
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from lowtide.report.tables import table
from lowtide.report.wording import counted, lasting, percent, size

__all__ = [
    "demonstrated",
    "estimated",
    "inspected",
    "optional",
    "quantized",
    "rescheduled",
    "table",
    "temporal",
]

_NAMED = 12
_FEW = 4
PLACES = {"whole": "the whole denoiser", "blocks": "block by block"}
Result = Mapping[str, Any]


def quantized(result: Result) -> list[str]:
    """What `lowtide quantize` did: sizes, stages, prediction, bytes, kernels, layers in float."""
    ratio = result["on_disk"] / result["float_bytes"]
    duration = lasting(60 * result["minutes"])
    return [
        f"{result['model']} is quantized by {result['method']}: {_bits(result)}.",
        f"Saved to {result['folder']}: {size(result['float_bytes'])} of float32 weights -> "
        f"{size(result['on_disk'])} on disk ({ratio:.3f}x), in {duration}, calibrated at "
        f"{result['timesteps']} timesteps.",
        "",
        *table(["stage", "time", "result"], _stages(result)),
        *_options(result),
        *_against(result),
        *_account(result["account"]),
        *temporal(result.get("temporal", {})),
        *_kernels(result["kernels"]),
        f"left in float: {100 * result['float_share']:.1f} % of the parameters except biases",
        *_reasons(result["float"]),
        *_constant(result.get("constant_inputs", [])),
        *_rolled_back(result.get("losses", {})),
    ]


def _constant(names: Sequence[str]) -> list[str]:
    """Inputs whose range has collapsed."""
    if not names:
        return []
    shown = ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")
    return [f"one value alone in calibration, so its range has no width: {shown}"]


def _rolled_back(losses: Mapping[str, tuple[float, float]]) -> list[str]:
    """How many parts keep what they had before they learnt, and which."""
    if not losses:
        return []
    worse = [name for name, (before, after) in losses.items() if not after < before]
    shown = f": {', '.join(worse[:_FEW])}" + (", ..." if len(worse) > _FEW else "") if worse else ""
    whole = counted(len(losses), "part")
    return [f"{len(worse)} of {whole} that learnt were rolled back, being no better{shown}"]


def converted(result: Result) -> list[str]:
    """What `lowtide convert` made."""
    parts = ", ".join(f"{name} ({kind})" for name, kind in result["parts"].items())
    average = "the moving average of its weights" if result["ema"] else "its weights as trained"
    return [
        f"{result['folder']} holds a {result['pipeline']}: {parts}.",
        f"{result['parameters']:,} parameters; of the UNet {average}.",
    ]


def _kernels(counts: Mapping[str, int]) -> list[str]:
    """How many layers each kernel runs, and why."""
    return [
        f"{counted(count, 'layer')} run by the kernel: {kernel}" for kernel, count in counts.items()
    ]


def _bits(result: Result) -> str:
    """weights of 4 bits, inputs of 8 bits (W4A8)"""
    short = f"W{result['weights']}A{result['inputs']}"
    return f"weights of {result['weights']} bits, inputs of {result['inputs']} bits ({short})"


def _stages(result: Result) -> list[list[str]]:
    """Each stage with its time, what it did, and how far the error fell where it learnt."""
    losses: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for key, (before, after) in result.get("losses", {}).items():
        losses[key.split()[0]].append((before, after))
    notes = {name: f": {_progress(pairs)}" for name, pairs in losses.items()}
    return [
        [name, lasting(time), result["summaries"][name] + notes.get(name, "")]
        for name, time in result["seconds"].items()
    ]


def _progress(losses: list[tuple[float, float]]) -> str:
    """kept 21 of 22, error 63 % lower (median)"""
    falls = [1 - after / before for before, after in losses if after < before]
    if not falls:
        return "none was better than before, nothing was changed"
    kept = f"kept {len(falls)} of {len(losses)}, " if len(falls) < len(losses) else ""
    median = " (median)" if len(falls) > 1 else ""
    return f"{kept}error {percent(statistics.median(falls))} lower{median}"


def temporal(cache: Result) -> list[str]:
    """The share of the temporal features that is cached, and the bytes of the block and its caches.

    The caches may take more bytes than the block took before.
    """
    lines = []
    if cache.get("features"):
        share = 100 * cache["cached_share"]
        before = cache["bytes_before"]
        after = cache["bytes_after"]
        cached = f"temporal features cached: {share:.0f} % of (t, block) pairs"
        lines.append(f"{cached}; {before:,} -> {after:,} bytes")
    if cache.get("by_request"):
        count = cache["by_request"]
        lines.append(f"of these, {count} features once a request")
    return lines


def _options(result: Result) -> list[str]:
    """The options of single stages."""
    return [f"with {option}" for option in optional(result.get("options", {}))]


def optional(stages: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Options of stages as --set takes them."""
    lines = []
    for stage, options in stages.items():
        lines += [f"{stage}.{name}={value}" for name, value in options.items()]
    return lines


def rescheduled(result: Result) -> list[str]:
    """From which schedule to which, and what was computed again."""
    steps = f"{result['from']} steps -> {result['steps']} steps"
    return [
        f"{result['model']} -> {result['folder']}: {steps}",
        f"{size(result['on_disk'])} on disk",
        f"Cached features are computed again at {counted(len(result['timesteps']), 'timestep')}: "
        f"{result['features']}",
        "Ranges are interpolated; the nearest calibrated timestep is at most "
        f"{result['farthest']:g} away.",
    ]


def recalibrated(result: Result) -> list[str]:
    """Which LoRA is in the model now, and how far the ranges moved."""
    return [
        f"{result['model']} + {result['lora']} -> {result['folder']}",
        f"{size(result['on_disk'])} on disk",
        f"The steps of {counted(result['inputs'], 'input')} are {result['narrowest']:.2f} to "
        f"{result['widest']:.2f} times as wide as before. Weights stay as they are.",
        f"Mean error of the answer: {result['bias']}",
    ]


def _against(result: Result) -> list[str]:
    """The prediction before the run beside its outcome."""
    if "predicted" not in result:
        return []
    predicted = result["predicted"]
    rows = [
        ["size on disk", size(predicted["on_disk"]), size(result["on_disk"])],
        ["peak memory", size(predicted["peak_bytes"]), size(result["peak_bytes"])],
        ["time", lasting(60 * predicted["minutes"]), lasting(60 * result["minutes"])],
    ]
    return ["", *table(["", "predicted", "real"], rows), ""]


def estimated(result: Result) -> list[str]:
    """What `lowtide plan` says: a table of stages, then size, memory and time in words."""
    rows = [
        [stage["name"], lasting(stage["seconds"]), size(stage["peak_bytes"])]
        for stage in result["stages"]
    ]
    whole = ["in all", lasting(result["seconds"]), size(result["peak_bytes"])]
    total = result["size"]["total"]
    ratio = total / result["float_bytes"]
    memory = result["memory"]
    memory_of = "peak of the CPU's memory" if "card" in result else "peak memory"
    return [
        f"To quantize {result['model']} by {result['method']}, {_bits(result)}, takes:",
        *_fitting(result),
        *_options(result),
        "",
        *table(["stage", "time", memory_of], [*rows, whole], right=True),
        "",
        *on_the_card(result),
        f"The checkpoint takes {size(total)}, "
        f"{ratio:.3f} of the {size(result['float_bytes'])} in float32.",
        *_account({kind: count for kind, count in result["size"].items() if kind != "total"}),
        *(f"{name} stays in float: {size(count)}" for name, count in result["others"].items()),
        f"Memory holds {size(memory['weights'])} of weights, {size(memory['calls'])} of recorded "
        f"calls, and at most {size(memory['tape'])} of tape (--memory).",
        f"Memory is what comes on top of Python and its libraries; time is for {_timed(result)}.",
        *(f"The stage {name} has no price and counts as nothing." for name in result["unpriced"]),
    ]


def _timed(result: Result) -> str:
    """Whose time a plan states."""
    if "card" not in result:
        return "this machine as busy as it is now"
    card = result["card"]
    how = "by its data sheet, not measured" if card["reckoned"] else "by probes"
    return f"{card['name']}, {how}"


def on_the_card(result: Result) -> list[str]:
    """Memory on an accelerator: every way to place the model there, and the one that is chosen."""
    if "card" not in result:
        return []
    card = result["card"]
    memory = "memory unknown" if card["memory"] is None else size(card["memory"])
    rows = [_way(way) for way in card["ways"]]
    lines = [
        f"Memory on {card['name']} ({memory}):",
        *table(["weights", "on the card", "whole batches", "in parts", ""], rows),
        f"The run holds the model in {card['dtype']}, {PLACES[card['place']]}: "
        f"{size(card['peak_bytes'])} at its peak, {size(card['parts_bytes'])} with batches in "
        f"parts of a few samples{_fitted(card)}.",
    ]
    if card["moving_seconds"]:
        lines.append(
            f"Weights that come and go take {lasting(card['moving_seconds'])} of the time."
        )
    largest = f"The largest unit that is learnt at once has {card['largest_unit'] / 1e6:.1f}"
    return [*lines, f"{largest} million weights.", ""]


def _way(way: Result) -> list[str]:
    width = "float32" if way["bytes_of_a_weight"] == 4 else "bfloat16 or float16"
    known = {None: "", True: "fits", False: "does not fit"}[way["fits"]]
    sizes = [size(way["peak_bytes"]), size(way["parts_bytes"])]
    return [width, PLACES[way["place"]], *sizes, known]


def _fitted(card: Result) -> str:
    """What a run does on a card of this memory."""
    if card["fits"] is None:
        return ""
    if not card["fits"]:
        return ", which does not fit"
    whole = card["peak_bytes"] <= card["memory"]
    return ", which fits" if whole else "; batches that do not fit are cut by the run"


def _fitting(result: Result) -> list[str]:
    if "fit" not in result:
        return []
    fit = result["fit"]
    sizes = ", ".join(f"{bits} bits: {size(count)}" for bits, count in fit["tried"].items())
    return [f"--fit {size(fit['limit'])} chose {fit['weights']}-bit weights ({sizes})."]


def _account(parts: Mapping[str, int]) -> list[str]:
    return ["size by kind:", *(f"  {name:<14} {size(count):>12}" for name, count in parts.items())]


def _reasons(left: Mapping[str, str]) -> list[str]:
    """What was not quantized and why, equal reasons together."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, why in left.items():
        reasons[why].append(name)
    return list(chain.from_iterable(_reason(why, names) for why, names in reasons.items()))


def _reason(why: str, names: list[str]) -> list[str]:
    """A reason and its layers; a large model has hundreds of norms."""
    rest = len(names) - _NAMED
    more = [f"and {rest} more, all in --json"] if rest > 0 else []
    lines = textwrap.wrap(", ".join([*names[:_NAMED], *more]), 96, break_long_words=False)
    return [f"  {why}: {len(names)}", *(f"    {line}" for line in lines)]


def inspected(result: Result) -> list[str]:
    """Units, layers, bytes and layers in float of a model."""
    timesteps = len(result["timesteps"])
    return [
        f"{result['model']}: {result['architecture']}, {result['parameters']:,} parameters, "
        f"{timesteps} calibrated timesteps",
        "",
        *table(["unit", "name", "layers", "weights", "reads"], map(_unit, result["units"])),
        "",
        *table(["layer", "shape", "W", "A", "ranges"], map(_layer, result["layers"])),
        "",
        *_account(result["account"]),
        *_kernels(Counter(result["kernels"].values())),
        "left in float:",
        *_reasons(result["float"]),
    ]


def _unit(unit: Result) -> list[str]:
    reads = ", ".join(unit["reads"])
    return [unit["kind"], unit["name"], str(unit["layers"]), f"{unit['weights']:,}", reads]


def _layer(layer: Result) -> list[str]:
    shape = "x".join(map(str, layer["shape"]))
    ranges = "per step" if layer["per_step"] else ""
    return [layer["name"], shape, str(layer["weights"]), str(layer["inputs"]), ranges]


def exported(result: Result) -> list[str]:
    """Where the export stands, its size, how far its answers are, and what it lost."""
    return [
        f"{result['to']} in {result['folder']}: {size(result['weight_bytes'])} "
        f"({size(result['packed_bytes'])} packed)",
        f"error of the answer: {result['error']:.2e} (relative L2, against the packed model)",
        *result["lost"],
    ]


def demonstrated(result: Result) -> list[str]:
    """A table for each model, the paths of its picture and its report, and the missing models."""
    lines = chain.from_iterable(map(_performed, result["acts"]))
    names = result["missing"]
    return [*lines, *(f"{name} is not here: only the repository has it" for name in names)]


def _performed(act: Result) -> list[str]:
    head = ["model", "size on disk", "PSNR to float", "seconds per step"]
    return [
        "",
        f"{act['model']}, {lasting(60 * act['minutes'])}",
        *table(head, map(_candidate, act["rows"])),
        f"picture: {act['picture']}",
        f"report:  {act['report']}",
    ]


def _candidate(row: Result) -> list[str]:
    psnr = "" if row["psnr"] is None else f"{row['psnr']:.2f} dB"
    return [row["name"], size(row["bytes"]), psnr, f"{row['seconds_per_step']:.4f}"]
