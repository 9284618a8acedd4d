"""Edits whose hashes are made anew, with values that no quantization gives.

Hashes cannot tell them from a checkpoint. Loading has to: by bounds, and by what must agree.
"""

import base64
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from faulty.damage import HUGE, Fault, NothingToDo, fault, files_of, read_file, sealed
from lowtide.checkpoint import seal
from lowtide.checkpoint.belonging import name_weights
from lowtide.checkpoint.file_format import HASH, HASHES, PLAN
from lowtide.checkpoint.manifest import MANIFEST, listed, write_manifest
from lowtide.kernels.hashing import checksums

Entries = dict[str, str]
State = dict[str, Tensor]


def reseal(folder: Path, path: Path, entries: Entries, state: State) -> None:
    """Write the tensors with hashes that fit them, and those of the whole folder.

    Where several files hold them, each tensor stays in its file, and a new one goes to `path`.
    """
    in_order = checksums([state[name] for name in sorted(state)], HASH)
    entries = entries | {HASHES: base64.b64encode(b"".join(in_order)).decode()}
    entries |= seal.seal_of(entries[PLAN], state)
    places = {
        each: [name for name in read_file(each)[0] if name in state] for each in sealed(folder)
    }
    known = {name for names in places.values() for name in names}
    places[path] += [name for name in state if name not in known]
    for each, names in places.items():
        save_file({name: state[name] for name in names}, each, metadata=entries)
    _rewrite_index(folder, places)
    name_weights(path.parent)
    seal.finish(folder)
    rewrite_manifest(folder)


def _rewrite_index(folder: Path, places: dict[Path, list[str]]) -> None:
    for index in folder.rglob("*.safetensors.index.json"):
        value = json.loads(index.read_text())
        value["weight_map"] = {name: each.name for each, names in places.items() for name in names}
        index.write_text(json.dumps(value))


def rewrite_manifest(folder: Path) -> None:
    if (folder / MANIFEST).is_file():
        names = [name for name in listed(folder) if name != MANIFEST and (folder / name).is_file()]
        write_manifest(folder, names)


def opened(folder: Path, rng: random.Random) -> tuple[Path, Entries, State]:
    paths = sealed(folder)
    path = rng.choice(paths)
    state: State = {}
    for each in paths:
        state |= load_file(each)
    return path, read_file(path)[0]["__metadata__"], state


def bits_of(rng: random.Random) -> Any:
    return rng.choice([10**9, 2**60, 0, -1, 9, 2.5, "8x", None, True, [], "9" * 40])


def _format(data: dict[str, Any], rng: random.Random) -> str:
    kinds = [kind[side] for kind in data["kinds"] for side in ("weight", "input")]
    form = rng.choice([each for each in kinds if each])
    field = rng.choice(["bits", "kind", "group", "axis", "signed", "top"])
    values: dict[str, Any] = {
        "bits": bits_of(rng),
        "kind": rng.choice(["nonsense", None, 5]),
        "group": rng.choice([10**9, 0, -1, "x", 2**60]),
        "axis": rng.choice([1, 7, -1, "x"]),
        "signed": rng.choice([2, "x", None]),
        "top": 5,
    }
    if field == "axis" and form["kind"] in ("affine",) and form["axis"] == values["axis"]:
        raise NothingToDo
    form[field] = values[field]
    return field


def _timesteps(data: dict[str, Any], rng: random.Random) -> str:
    steps = data["timesteps"]
    choices = [[2**60] * len(steps), [], [steps[0]] * len(steps), ["x"], [*steps, 5], None, [1.5]]
    choices += [list(range(10**6)), [step + 1 for step in steps], steps[::-1]]
    data["timesteps"] = rng.choice(choices)
    return "timesteps"


def _times(data: dict[str, Any], rng: random.Random) -> str:
    # A plan leaves them out where they are its timesteps.
    times = data.get("times", data["timesteps"])
    if not times:
        raise NothingToDo
    choices = [[math.nan] * len(times), [time + 7 for time in times], times[:-1], "x", [None]]
    data["times"] = rng.choice([*choices, [1e308] * len(times)])
    return "times"


def _ticks(data: dict[str, Any], rng: random.Random) -> str:
    data["ticks"] = rng.choice([0, -1, 2**70, "x", 1.5, None])
    return "ticks"


def _kind_number(data: dict[str, Any], rng: random.Random) -> str:
    layers = data["layers"]
    name = rng.choice(list(layers))
    wrong = rng.choice([10**9, -1, "x", None, 1.5, len(data["kinds"])])
    layers[name] = [wrong, layers[name][1]] if isinstance(layers[name], list) else wrong
    return "layers"


def _layer_name(data: dict[str, Any], rng: random.Random) -> str:
    layers = data["layers"]
    name = rng.choice(list(layers))
    wrong = rng.choice(["nowhere.at.all", "", "..", f"{name}.weight", "time_embedding"])
    layers[wrong] = layers.pop(name)
    return "layers"


def _layer_left_out(data: dict[str, Any], rng: random.Random) -> str:
    del data["layers"][rng.choice(list(data["layers"]))]
    return "layers"


def _part(data: dict[str, Any], rng: random.Random) -> str:
    """A part of the plan that few models have."""
    wrong: dict[str, Any] = {
        "cached": {"time_embedding.linear_2": {"width": 2**60, "format": None}},
        "blank": {"conv_in": 2**60},
        "splits": {"conv_in": rng.choice([0, -1, 10**9, "x"])},
        "requests": {"conv_in": rng.choice([["nothing"], "x", {"reads": 5}])},
        "sides": {"conv_in": {"rank": rng.choice([2**60, 0, -1, "x"])}},
        "corrected": rng.choice([2**60, -1, "x", 10**9, 1.5]),
        "attentions": {"conv_in": {"q": 0}},
        "left": rng.choice([5, {"x": 5}, []]),
        "summary": rng.choice([5, [], None]),
        "method": rng.choice([5, [], None]),
        "kinds": rng.choice([5, [], None, [5]]),
        "layers": rng.choice([5, [], None]),
        "nonsense": 5,
    }
    field = rng.choice(sorted(wrong))
    data[field] = wrong[field]
    return field


PLAN_EDITS = (
    _format, _format, _format, _timesteps, _times, _ticks, _kind_number, _layer_name,
    _layer_left_out, _part, _part,
)  # fmt: skip


def plan(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path, entries, state = opened(folder, rng)
    data = json.loads(entries[PLAN])
    field = rng.choice(PLAN_EDITS)(data, rng)
    text = json.dumps(data)
    if json.loads(entries[PLAN]) == json.loads(text):
        raise NothingToDo
    reseal(folder, path, entries | {PLAN: text}, state)
    return fault("re-hashed plan", f"{field}: {str(data[field])[:40] if field in data else ''}",
                 path, "plan", field, *state)  # fmt: skip


def order(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    """The keys of the plan in another order, as another JSON library writes them."""
    path, entries, state = opened(folder, rng)
    data = json.loads(entries[PLAN])
    for field in ("layers", "attentions", "cached", "left"):
        names = list(data[field])
        rng.shuffle(names)
        data[field] = {name: data[field][name] for name in names}
    reseal(folder, path, entries | {PLAN: json.dumps(data, sort_keys=rng.random() < 0.5)}, state)
    return fault("re-hashed order", "keys of the plan", path, "plan")


def _poison(tensor: Tensor, rng: random.Random) -> Tensor:
    """One value, or all, that a scale cannot have."""
    wrong = rng.choice([math.nan, math.inf, -math.inf, -1.0, 0.0])
    changed = tensor.clone()
    if rng.random() < 0.5:
        return torch.full_like(changed, wrong)
    changed.view(-1)[rng.randrange(changed.numel())] = wrong
    return changed


def tensor(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path, entries, state = opened(folder, rng)
    clock = "lowtide_clock."
    name = rng.choice(sorted(state))
    if rng.random() < 0.4:
        name = rng.choice([f"{clock}scale", f"{clock}zero", f"{clock}timesteps"])
    before = state[name]
    if not before.numel():
        raise NothingToDo
    if name.endswith(".grid"):
        changed = before.clone()
        changed[: 1 + rng.randrange(3)] = _poison(torch.ones(1), rng).view(torch.int32)
        state[name] = changed
    elif name == f"{clock}timesteps":
        state[name] = before + 1
    elif name.endswith("scale"):
        state[name] = _poison(before, rng)
    elif before.is_floating_point():
        wrong = rng.choice([math.nan, math.inf])
        state[name] = torch.full_like(before, wrong)
    elif name == f"{clock}zero":
        state[name] = before.to(torch.int32) + 2**20
    else:
        state[name] = _bent(before, rng)
    reseal(folder, path, entries, state)
    return fault("re-hashed tensor", name, path, name.rpartition(".")[0], "clock", *state)


def _bent(codes: Tensor, rng: random.Random) -> Tensor:
    """Codes of another type or shape."""
    return rng.choice([
        codes.to(torch.int32), codes.unsqueeze(0), codes[:-1], torch.cat([codes, codes]),
        codes.reshape(-1, 1), codes.float(),
    ]).contiguous()  # fmt: skip


def tensors(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    """A tensor too many, or too few."""
    path, entries, state = opened(folder, rng)
    name = rng.choice(sorted(state))
    if rng.random() < 0.5:
        state[f"{name}.more"] = state[name].clone()
    else:
        del state[name]
    reseal(folder, path, entries, state)
    return fault("re-hashed tensors", name, path, name, "tensors")


SIZES = {
    "unet": ("block_out_channels", "layers_per_block", "in_channels", "norm_num_groups",
             "attention_head_dim", "cross_attention_dim", "sample_size"),
}  # fmt: skip


def config(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    """Sizes of the network that no machine holds."""
    path = folder / "unet" / "config.json"
    value = json.loads(path.read_text())
    field = rng.choice([each for each in SIZES["unet"] if value.get(each) is not None])
    wrong = rng.choice([*HUGE, 100_000, -1, 0, "x", None, 1.5, [], [2**60, 2**60]])
    was = value[field]
    value[field] = [wrong] * len(was) if isinstance(was, list) and rng.random() < 0.7 else wrong
    if field in ("sample_size", "attention_head_dim", "cross_attention_dim"):
        value[field] = rng.choice([2**60, 10**30, "x", [2**60]])
    path.write_text(json.dumps(value))
    seal.finish(folder)
    rewrite_manifest(folder)
    return fault("re-hashed config", f"{field} is {str(value[field])[:30]}", path, field, "unet")


def quantization_config(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path = folder / "unet" / "config.json"
    value = json.loads(path.read_text())
    inner = value["quantization_config"]
    field = rng.choice(sorted(inner))
    wrong = [10**9, -1, "x", None, [], {}, 2.5, {"weights": 10**9}, True]
    inner[field] = rng.choice([each for each in wrong if each != inner[field]])
    if field in ("method", "weights", "inputs", "group", "modules_to_not_convert"):
        raise NothingToDo  # words for people: the plan says what is true
    path.write_text(json.dumps(value))
    rewrite_manifest(folder)
    return fault("re-hashed quantization_config", f"{field} is {inner[field]}", path, field)


def scheduler(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path = folder / "scheduler" / "scheduler_config.json"
    value = json.loads(path.read_text())
    edits: dict[str, tuple[Any, ...]] = {
        "num_train_timesteps": (*HUGE, 0, -1, "x", None, 1.5, []),
        "beta_schedule": ("nonsense", 5, None, []),
        "beta_start": ("x", [], {}),
        "_class_name": ("Nonsense", 5, None, "DiffusionPipeline"),
        "trained_betas": ("x", 5),
    }
    field = rng.choice(sorted(edits))
    value[field] = rng.choice(edits[field])
    path.write_text(json.dumps(value))
    rewrite_manifest(folder)
    return fault("re-hashed scheduler", f"{field} is {value[field]}", path, field, "scheduler")


def index(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    """model_index.json, or the index of several files of weights."""
    found = [path for path in files_of(folder) if path.name.endswith("index.json")]
    path = rng.choice(found)
    value = json.loads(path.read_text())
    if "weight_map" in value:
        name = rng.choice(sorted(value["weight_map"]))
        outside = f"../../outside/{WEIGHTS_PART}"
        edits = [outside, "/etc/hostname", "", 5, None, "..", "nowhere.safetensors"]
        value["weight_map"][name] = rng.choice(edits)
        words = (name, "weight_map")
    else:
        name = rng.choice([each for each in value if not each.startswith("_diffusers")])
        edits = [["os", "system"], ["nonsense", "Nonsense"], 5, [], "x", ["../x", "y"]]
        value[name] = rng.choice(edits)
        words = (name,)
    path.write_text(json.dumps(value))
    rewrite_manifest(folder)
    return fault("re-hashed index", f"{name}", path, *words)


WEIGHTS_PART = "diffusion_pytorch_model-00001-of-00002.safetensors"
NONSENSES: tuple[Callable[[Path, random.Random, list[Path]], Fault], ...] = (
    plan, plan, order, tensor, tensor, tensors, config, quantization_config, scheduler, index,
)  # fmt: skip
