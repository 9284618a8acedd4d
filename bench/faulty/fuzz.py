"""One input of the fuzzer: a header, a plan, an index or a configuration from anybody.

`attempt` gives it to the functions that read such a file. BadInput is an answer; every other
exception is a finding. The first byte of an input chooses what the rest of it is.
"""

import copy
import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from faulty.damage import NONSENSE, WEIGHTS
from lowtide.checkpoint import config_checks, diffusers_hook, file_format, own_maps
from lowtide.checkpoint.headers import METADATA, header_of
from lowtide.checkpoint.quantization_config import LowtideConfig
from lowtide.errors import BadInput
from lowtide.formats import Affine
from lowtide.nn.feature_cache import CachePlan
from lowtide.nn.plan import LayerPlan, Plan, RequestPlan
from lowtide.nn.side_branch import SidePlan

NAMES = ("proj", "transformer_blocks.0", "lowtide_clock", "no such layer", "", "a.b\0", "x" * 300)
LONGEST = 2**16  # bytes of an input


def network() -> DiTTransformer2DModel:
    with torch.device("meta"):
        return DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=1,
            sample_size=8,
            num_embeds_ada_norm=10,
        )


_NETWORK = network()


def read_header(content: bytes, room: Path) -> None:
    """What is read of a file of weights before its tensors."""
    path = room / WEIGHTS
    path.write_bytes(content)
    names = [name for name in header_of(path)[1] if name != METADATA]
    entries = file_format.read_metadata(path)
    file_format.verify_plan(entries, path)
    file_format.verify_kinds(entries, [path])
    file_format.hashes_by_name(names, entries[file_format.HASHES])
    own_maps.spans([path])


def read_plan(content: bytes, room: Path) -> None:
    """The plan, and the network that is built from it, without memory for its tensors."""
    try:
        text = content.decode()
    except UnicodeDecodeError:  # safetensors refuses it, as read_header shows
        return
    plan = Plan.from_json(text)
    diffusers_hook._build_skeleton(copy.deepcopy(_NETWORK), plan)
    assert Plan.from_json(plan.to_json()) == plan


def read_index(content: bytes, room: Path) -> None:
    """The index of several files, and that of a pipeline."""
    (room / config_checks.INDEX).write_bytes(content)
    (room / "weights.safetensors.index.json").write_bytes(content)
    for read in (config_checks.check_index, _check_shards):
        with suppress(BadInput):
            read(room)


def _check_shards(room: Path) -> None:
    (room / "config.json").write_text("{}")
    config_checks.check_config(room / "config.json", DiTTransformer2DModel)


def read_config(content: bytes, room: Path) -> None:
    """What is checked of a configuration before diffusers reads it, and what is said to lowtide."""
    for name in ("config.json", config_checks.SCHEDULER):
        (room / name).write_bytes(content)
    fields = config_checks.read_json(room / "config.json")
    with suppress(BadInput):
        config_checks.check_scheduler(room)
    config_checks.check_config(room / "config.json", DiTTransformer2DModel)
    if isinstance(ours := fields.get("quantization_config"), dict):
        config = LowtideConfig.from_dict(ours)
        file_format.check_version(config.format_version)
        config.to_dict()


TARGETS: tuple[Callable[[bytes, Path], None], ...] = (
    read_header,
    read_plan,
    read_index,
    read_config,
)


def attempt(data: bytes, room: Path) -> None:
    """Read this input, in a folder of the fuzzer's own."""
    if not data or len(data) > LONGEST:
        return
    for path in room.iterdir():
        path.unlink()
    try:
        TARGETS[data[0] % len(TARGETS)](data[1:], room)
    except BadInput:
        return


def header_bytes(header: Any, tensors: bytes = b"") -> bytes:
    """A file of weights with this header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def some_plan() -> Plan:
    """A plan that has something in each field."""
    weight = LayerPlan(Affine(4, axis=0, group=8), Affine(8, signed=False), per_step=True)
    cache = CachePlan(12, Affine(8, axis=0), chunks=3)
    return Plan(
        layers={"proj_out_1": weight, "proj_out_2": LayerPlan(Affine(8, axis=0), None)},
        timesteps=(999, 499),
        times=(999.25, 499.0),
        method="tfmq",
        summary={"weights": 4, "steps": 2},
        left={"pos_embed.proj": "the first layer"},
        splits={"proj_out_2": 8},
        blank={"transformer_blocks.0.norm1.linear": 4},
        cached={"transformer_blocks.0.norm1.emb": cache},
        corrected=4,
        requests={"adaln": RequestPlan(("class_labels", "timestep"), cache, weight)},
        sides={"proj_out_2": SidePlan(rank=2, bias=True)},
    )


def seeds() -> list[bytes]:
    """Inputs that the fuzzer starts from: whole ones, one of each kind or more."""
    plan = Plan.from_json(some_plan().to_json()).to_json()
    tensors = {"a": torch.arange(4, dtype=torch.float32), "b": torch.zeros(2, dtype=torch.uint8)}
    entries = file_format.metadata(Plan.from_json(plan), tensors)
    header = {
        METADATA: entries,
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [16, 18]},
    }
    index = {"metadata": entries, "weight_map": {"a": WEIGHTS, "b": WEIGHTS}}
    pipeline = {"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"], "x": [None]}
    config = {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": 8,
        "num_train_timesteps": 1000,
        "beta_start": 0.1,
        "trained_betas": [0.1, 0.2],
        "quantization_config": LowtideConfig(weights=4, seals=["ab"]).to_dict(),
    }
    layer_alone = Plan(layers={"proj_out_2": LayerPlan(Affine(8, axis=0), None)}).to_json()
    return [
        b"\0" + header_bytes(header, bytes(18)),
        b"\1" + plan.encode(),
        b"\1" + layer_alone.encode(),
        b"\2" + json.dumps(index).encode(),
        b"\2" + json.dumps(pipeline).encode(),
        b"\3" + json.dumps(config).encode(),
    ]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The input with one change: of a value in its JSON, or of its bytes."""
    start = 9 if data and data[0] % len(TARGETS) == 0 else 1
    if rng.random() < 0.8:
        try:
            value = json.loads(data[start:].rstrip(b"\0"))
        except (ValueError, RecursionError):
            return _changed_bytes(data, rng)
        value = _changed_value(value, rng)
        text = json.dumps(value).encode()
        if start == 9:
            return data[:1] + header_bytes(value, bytes(rng.choice([0, 18, 18])))
        return data[:1] + text
    return _changed_bytes(data, rng)


def _changed_bytes(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([0, 1, 1, 8]))
    deep = rng.choice(["[", '{"a":']) * rng.choice([500, 990, 3000])
    digits = "9" * rng.choice([20, 400, 5000])
    middle = rng.choice([rng.randbytes(1), b"", deep.encode(), digits.encode(), b"\xed\xa0\x80"])
    return data[:start] + middle + data[end:]


def _changed_value(value: Any, rng: random.Random) -> Any:
    """One value, or one name, somewhere inside."""
    if rng.random() < 0.1 or not isinstance(value, dict | list) or not value:
        return _other(value, rng)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        return [*value[:place], _changed_value(value[place], rng), *value[place + 1 :]]
    name = rng.choice(list(value))
    if rng.random() < 0.2:
        return {key: each for key, each in value.items() if key != name}
    if rng.random() < 0.2:
        return value | {rng.choice([*NAMES, *value]): value[name]}
    if isinstance(value[name], str) and value[name].startswith("{"):
        with suppress(ValueError):  # an earlier change may have left no JSON
            return value | {name: json.dumps(_changed_value(json.loads(value[name]), rng))}
    return value | {name: _changed_value(value[name], rng)}


def _other(value: Any, rng: random.Random) -> Any:
    deep: Any = []
    for _ in range(rng.choice([10, 900])):
        deep = [deep]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 2**31, -value])
    return rng.choice([*NONSENSE, *NAMES, 10**400, 1.5, False, deep, {"a": 1}, [1, 1], "\ud800"])
