"""The same damage done to checkpoints of several quantizers: who notices?

    PYTHONPATH=. bench/.venv-peers/bin/python bench/faulty_peers.py [--count 40] [--only sdnq]

`make peers` sets that environment up. Each quantizer packs a tiny random DiT to 8-bit weights,
OrbitQuant to 4, in the way that its documentation names, saves it, and loads it again through
diffusers. Then a copy of the folder is damaged and loaded. A load that raises any error noticed the
damage. A load that answers as before lost nothing. A load that answers otherwise, without a word,
is what this counts.
"""

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from faulty import damage

from lowtide.report.text import table

SECONDS = 20
MOST = 8 << 30  # bytes of address space of a load
DAMAGES: dict[str, Callable[..., damage.Fault]] = {
    "a flipped bit": damage.flip,
    "a run of zeros": damage.blank,
    "a file cut short": damage.cut,
    "bytes appended": damage.grow,
    "a file removed": damage.remove,
    "a file of another model": damage.swap,
    "an entry of the header": damage.header,
    "a field of config.json": damage.json_field,
}
OTHER = "other"
Pack = Callable[[Path, Path], None]
Load = Callable[[Path], torch.nn.Module]


def tiny(seed: int) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.02)
    return model.eval()


def plain_load(folder: Path) -> torch.nn.Module:
    return DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)


def pack_float(source: Path, folder: Path) -> None:
    plain_load(source).save_pretrained(folder)


def pack_lowtide(source: Path, folder: Path) -> None:
    import lowtide

    config = lowtide.LowtideConfig(weights=8, inputs=16)
    model = DiTTransformer2DModel.from_pretrained(source, quantization_config=config)
    model.save_pretrained(folder)


def pack_sdnq(source: Path, folder: Path) -> None:
    from sdnq import sdnq_post_load_quant

    model = sdnq_post_load_quant(plain_load(source), weights_dtype="int8", add_skip_keys=False)
    model.save_pretrained(folder)


def pack_torchao(source: Path, folder: Path) -> None:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = DiTTransformer2DModel.from_pretrained(
        source, quantization_config=config, torch_dtype=torch.float32
    )
    model.save_pretrained(folder)


def pack_quanto(source: Path, folder: Path) -> None:
    from diffusers import QuantoConfig

    config = QuantoConfig(weights_dtype="int8")
    model = DiTTransformer2DModel.from_pretrained(source, quantization_config=config)
    model.save_pretrained(folder)


def pack_orbitquant(source: Path, folder: Path) -> None:
    """At the 4 bits that it is made for. The import lets diffusers know it."""
    from orbitquant import OrbitQuantConfig

    model = DiTTransformer2DModel.from_pretrained(
        source, quantization_config=OrbitQuantConfig(), torch_dtype=torch.float32
    )
    model.save_pretrained(folder)


PEERS: dict[str, Pack] = {
    "diffusers, float": pack_float,
    "lowtide": pack_lowtide,
    "sdnq": pack_sdnq,
    "torchao": pack_torchao,
    "quanto": pack_quanto,
    "orbitquant": pack_orbitquant,
}


def answer(folder: Path) -> torch.Tensor:
    """What the loaded model says to one fixed input."""
    model = plain_load(folder).eval()
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return model(sample, torch.tensor([500]), torch.tensor([3]), return_dict=False)[0]


def tried(folder: Path) -> tuple[str, Any]:
    """Load in a process of its own; the outcome, and the answer or the error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
        signal.alarm(SECONDS)
        try:
            result = ("loaded", answer(folder))
        except Exception as error:
            result = ("refused", f"{type(error).__name__}: {error}"[:300])
        with os.fdopen(write, "wb") as pipe:
            pipe.write(pickle.dumps(result))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(data) if data else ("died", "")


def outcomes(folders: list[Path], count: int, room: Path) -> dict[str, Counter[str]]:
    """How often each kind of damage was refused, changed nothing, or passed unnoticed."""
    whole = {folder: tried(folder) for folder in folders}
    for outcome, found in whole.values():
        if outcome != "loaded":
            raise ValueError(f"the whole checkpoint does not load ({outcome}: {found})")
    result: dict[str, Counter[str]] = {}
    for kind, hurt in DAMAGES.items():
        counts: Counter[str] = Counter()
        for number in range(count):
            model = folders[number % len(folders)]
            copy = room / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(model, copy)
            if not _damaged(copy, number, hurt, [each for each in folders if each != model]):
                continue
            outcome, found = tried(copy)
            if outcome == "loaded":
                outcome = "same" if torch.equal(found, whole[model][1]) else OTHER
            counts[outcome] += 1
        result[kind] = counts
        print(kind, dict(counts), flush=True)
    return result


def _damaged(folder: Path, number: int, hurt: Callable[..., Any], others: list[Path]) -> bool:
    """Damage the folder; False where this kind of damage finds nothing to do."""
    for attempt in range(20):
        try:
            hurt(folder, random.Random(1000 * number + attempt), others)
        except damage.NothingToDo:
            continue
        return True
    return False


def line(kind: str, found: dict[str, dict[str, Counter[str]]]) -> list[str]:
    cells = [kind]
    for counts in (each.get(kind, Counter()) for each in found.values()):
        total = sum(counts.values())
        died = f", {counts['died']} died" if counts["died"] else ""
        cells.append(f"{counts[OTHER]} of {total}{died}" if total else "not tried")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--only", help="some of the quantizers, with commas between")
    parser.add_argument("--json", type=Path, help="keep the counts here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # SDNQ would compile each layer, which takes longer than all loads.
    os.environ |= {"SDNQ_USE_TORCH_COMPILE": "0", "HF_HUB_OFFLINE": "1"}
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, Counter[str]]] = {}
    with tempfile.TemporaryDirectory() as place:
        room = Path(place)
        for seed in (0, 1):
            tiny(seed).save_pretrained(room / f"float-{seed}")
        for peer in options.only.split(",") if options.only else PEERS:
            print(peer, flush=True)
            folders = [room / f"{peer}-{seed}" for seed in (0, 1)]
            try:
                for seed, folder in enumerate(folders):
                    PEERS[peer](room / f"float-{seed}", folder)
                found[peer] = outcomes(folders, options.count, room)
            except Exception as error:
                print(f"{peer} cannot be tried: {type(error).__name__}: {error}"[:300], flush=True)
    print("\nLoads that answered otherwise without a word:")
    print("\n".join(table(["damage", *found], [line(kind, found) for kind in DAMAGES])))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
