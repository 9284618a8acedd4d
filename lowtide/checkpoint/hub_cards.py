"""The model card that diffusers' own `push_to_hub` uploads with a packed model.

As its last step before the upload, diffusers writes a blank card over all others. So the upload is
wrapped: a blank card, or an older one of ours, becomes the card of the model. A card that somebody
wrote stays.
"""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt
from torch import nn

BLANK = "This model card has been automatically generated"


def wrap(module: ModuleType) -> None:
    """Make `push_to_hub` of diffusers' pipelines and models upload our card."""
    wrapt.wrap_function_wrapper(module, "PushToHubMixin._upload_folder", _with_card)


def _with_card(wrapped: Callable[..., Any], uploaded: Any, args: tuple, kwargs: dict) -> Any:
    """Write the card into the folder that is uploaded."""
    given = signature(wrapped).bind(*args, **kwargs).arguments
    model = _packed_part(uploaded)
    # diffusers writes no card for a subfolder.
    if model is not None and not given.get("subfolder"):
        _write_card(uploaded, model, Path(given["working_dir"]))
    return wrapped(*args, **kwargs)


def _packed_part(uploaded: Any) -> nn.Module | None:
    """The packed model that is uploaded, or the first one in a pipeline."""
    # The import comes late: this module is imported while diffusers is still being imported.
    from lowtide.checkpoint.diffusers_hook import LowtideQuantizer

    parts = getattr(uploaded, "components", {"": uploaded}).values()
    ours = (p for p in parts if isinstance(getattr(p, "hf_quantizer", None), LowtideQuantizer))
    return next(ours, None)


def _write_card(uploaded: Any, model: nn.Module, folder: Path) -> None:
    from lowtide.checkpoint import model_card, seal
    from lowtide.checkpoint.quantized_pipeline import named_by

    path = folder / model_card.NAME
    text = path.read_text(encoding="utf-8") if path.is_file() else BLANK
    if BLANK not in text and model_card.START not in text:
        return
    seal.finish(folder)
    pipeline = None if uploaded is model else type(uploaded).__name__
    facts = model_card.facts_of(model, folder, named_by(uploaded), pipeline)
    model_card.write(folder, facts)
