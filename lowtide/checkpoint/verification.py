"""What is wrong with a folder that lowtide wrote: files, headers, tensors and their values."""

from pathlib import Path

import torch

from lowtide import runtime, sampling
from lowtide.checkpoint import folders
from lowtide.checkpoint.bare_modules import bare_problems
from lowtide.checkpoint.facts import packed_plan
from lowtide.checkpoint.file_format import naming_all
from lowtide.checkpoint.manifest import MANIFEST, altered
from lowtide.checkpoint.values import value_problems
from lowtide.errors import BadInput
from lowtide.sampling.loading import module_facts


def problems_of(folder: Path) -> list[str]:
    """Everything that is wrong, a sentence each. An empty list: the folder is whole."""
    if not folder.is_dir():
        raise BadInput(f"found no folder {folder}", "one that lowtide wrote", "check the path")
    folders.recover_missing(folder)
    if not (folder / MANIFEST).is_file():
        raise BadInput(
            f"found no {MANIFEST} in {folder}", "a folder that lowtide wrote", "check the path"
        )
    found = [
        f"{name} {'was altered' if (folder / name).exists() else 'is missing'}"
        for name in altered(folder)
    ]
    if module_facts(folder) is not None:
        return [*found, *bare_problems(folder)]
    try:
        with sampling.quiet_libraries(), naming_all():
            pipe = sampling.load_pipeline(folder, torch.float32, torch.device("cpu"))
    except BadInput as error:
        return [*found, str(error)]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        words = str(error).partition("\n")[0]
        return [*found, f"diffusers cannot load it ({type(error).__name__}: {words})"]
    model = sampling.denoiser(pipe)
    runtime.unfuse(model)
    return [*found, *value_problems(model, packed_plan(model))]
