"""The model card of a packed folder: README.md, as the Hugging Face Hub reads it."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from torch import nn

from lowtide import sampling
from lowtide.checkpoint import facts as model_facts
from lowtide.checkpoint import folders, manifest
from lowtide.checkpoint.file_format import PICTURE
from lowtide.nn.plan import Plan
from lowtide.report.wording import counted, size

NAME = "README.md"
TAG = "lowtide"
LICENCE = ("license", "license_name", "license_link")
# Between these lines stands what `lowtide evaluate` measured.
START = "<!-- evidence -->"
END = "<!-- end of evidence -->"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class CardFacts:
    """What a card says. `source`: the float model, or the packed folder that was loaded.

    kind: the class that loads the folder. alone: the folder holds a denoiser without a pipeline.
    """

    plan: Plan
    source: str
    kind: str
    weights: int
    on_disk: int
    title: str
    alone: bool = False


def facts_of(model: nn.Module, folder: Path, source: str, pipeline: str | None) -> CardFacts:
    """The facts of a packed model that was written into a folder, in a pipeline or alone."""
    return CardFacts(
        plan=model_facts.packed_plan(model),
        source=source,
        kind=pipeline or type(model).__name__,
        weights=cast(Any, model).num_parameters(),
        on_disk=model_facts.on_disk(folder),
        title=Path(source.removeprefix("zoo:")).name or type(model).__name__,
        alone=pipeline is None,
    )


def write(folder: Path, facts: CardFacts) -> None:
    """Write the card of a folder that holds everything else."""
    card = ModelCard(f"---\n{card_data(facts).to_yaml()}\n---\n\n{_text(facts)}")
    (folder / NAME).write_text(str(card).rstrip() + "\n", encoding="utf-8")
    home = sampling.local_folder(facts.source) if facts.source else None
    if home is not None and _same_weights(home, folder):
        _keep_evidence(home, folder)


def card_data(facts: CardFacts) -> ModelCardData:
    """The metadata. A licence and a base model are passed on from the source's own card."""
    before = _metadata(facts.source)
    known = {name: before[name] for name in LICENCE if before.get(name)}
    if TAG in (before.get("tags") or ()):
        base = before.get("base_model")
    else:
        base = facts.source if _is_hub_id(facts.source) else None
    fields: dict[str, Any] = {"base_model": base} if base else {}
    return ModelCardData(
        library_name="diffusers",
        tags=[TAG, "quantized", _bits(facts.plan).lower()],
        base_model_relation="quantized",
        **known,
        **fields,
    )


def _is_hub_id(source: str) -> bool:
    return bool(HUB_ID.fullmatch(source)) and sampling.local_folder(source) is None


def _metadata(source: str) -> dict[str, Any]:
    """The metadata of the source's card, from its folder or from the Hub's cache."""
    folder = sampling.local_folder(source) if source else None
    if folder is not None:
        path = folder / NAME
    elif _is_hub_id(source):
        cached = try_to_load_from_cache(source, NAME)
        path = Path(cached) if isinstance(cached, str) else None
    else:
        path = None
    if path is None or not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        if not text.startswith("---"):
            return {}  # of a card without metadata the library warns
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}


def _bits(plan: Plan) -> str:
    return f"W{plan.summary['weights']}A{plan.summary['inputs']}"


def _text(facts: CardFacts) -> str:
    plan = facts.plan
    steps = plan.summary.get("steps") if plan.keyed else None
    sampled = f"It is calibrated for {steps} steps of its scheduler.\n\n" if steps else ""
    return f"""# {facts.title} in {_bits(plan)}

{_origin(facts)} is quantized by [lowtide](https://pypi.org/project/lowtide): weights of
{plan.summary["weights"]} bits, inputs of {plan.summary["inputs"]} bits, method `{plan.method}`,
{counted(len(plan.layers), "layer")}. The denoiser takes {size(facts.on_disk)} on disk, for
{facts.weights:,} parameters.

## Use it

```
pip install lowtide
```

```python
import lowtide  # before diffusers loads the model
from diffusers import {facts.kind}

{_program(facts.kind, steps, alone=facts.alone)}
```

{sampled}Without `import lowtide`, diffusers says "Unknown quantization type".

{_licence(facts)}
{START}
{END}
"""


def _program(kind: str, steps: object, *, alone: bool) -> str:
    """The lines that load the model, and sample where the folder holds a pipeline."""
    load = f'{kind}.from_pretrained("this folder or repository")'
    if alone:
        return f"model = {load}"
    arguments = f"num_inference_steps={steps}" if steps else ""
    return f"pipe = {load}\nimage = pipe({arguments}).images[0]"


def _origin(facts: CardFacts) -> str:
    if _is_hub_id(facts.source):
        return f"[{facts.source}](https://huggingface.co/{facts.source})"
    return f"`{facts.title}`"


def _licence(facts: CardFacts) -> str:
    found = _metadata(facts.source).get("license")
    if found:
        return f"The licence is that of the float model: {found}.\n"
    return "The licence of the float model applies.\n"


def add_evidence(folder: Path, rows: Mapping[str, Mapping[str, str]], picture: str = "") -> bool:
    """Write measured numbers, by model and metric, into the card; whether there is such a card.

    picture: the sentence below the picture that lies in the folder as PICTURE, if one does.
    """
    if evidence_in(folder) is None:
        return False
    names: dict[str, None] = {}
    for row in rows.values():
        names |= dict.fromkeys(row)
    cells = [[model, *(row.get(name, "") for name in names)] for model, row in rows.items()]
    lines = ["## Measured", "", *_markdown(["against", *names], cells), ""]
    if picture:
        lines += [f"![{picture}]({PICTURE})", "", picture, ""]
    path = folder / NAME
    with folders.written_file(path) as fresh:
        fresh.write_text(_with_evidence(path, "\n".join(["", *lines])), encoding="utf-8")
    return True


def evidence_in(folder: Path) -> str | None:
    """The evidence in a folder's card; None if the card has no place for it."""
    path = folder / NAME
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if START not in text or END not in text:
        return None
    return text.partition(START)[2].partition(END)[0]


def _with_evidence(path: Path, evidence: str) -> str:
    """The text of a card with other evidence."""
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{evidence}{END}{after}"


def _same_weights(home: Path, folder: Path) -> bool:
    """Whether two folders hold the same packed weights, by the hashes in their headers."""
    ours, theirs = (
        {path.relative_to(place): manifest.file_hash(path) for path in place.rglob("*.safetensors")}
        for place in (folder, home)
    )
    return bool(ours) and ours.items() <= theirs.items()


def _keep_evidence(home: Path, folder: Path) -> None:
    """What was measured of a folder holds for a copy of it."""
    evidence = evidence_in(home)
    if not (evidence or "").strip():
        return
    path = folder / NAME
    path.write_text(_with_evidence(path, evidence or ""), encoding="utf-8")
    if (home / PICTURE).is_file():
        shutil.copyfile(home / PICTURE, folder / PICTURE)


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
