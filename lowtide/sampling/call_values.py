"""More arguments of a pipeline's call, `call={...}`: pictures by path, and one value for each seed.

A text that ends like the name of a picture is one. Arguments that belong to an image, such as
prompts and pictures, may be lists: they are assigned to images by seed, like prompts.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowtide.errors import BadInput
from lowtide.sampling.request import PICTURES
from lowtide.settings import Request

# These belong to a request, or to lowtide.
OWN = {
    "num_inference_steps": "steps",
    "generator": "seeds",
    "latents": "seeds",
    "batch_size": "images",
    "eta": "eta",
    "output_type": "",
    "return_dict": "",
    "num_images_per_prompt": "images",
    "num_videos_per_prompt": "images",
}
# Arguments that fields of a request set too.
SAME_AS = {
    "prompt": "prompts",
    "prompt_embeds": "prompts",
    "image": "pictures",
    "mask_image": "pictures",
    "guidance_scale": "guidance",
    "height": "size",
    "width": "size",
    "class_labels": "labels",
}
# Arguments of which each image has one.
_OF_AN_IMAGE = re.compile(
    r"((negative_)?prompt(_\d)?|(mask_|control_|masked_)?image|class_labels|image_embeddings"
    r"|(negative_)?(image|prompt|pooled_prompt)_embeds(_\d)?(_mask)?"
    r"|(negative_)?(prompt_attention|prompt_embeds)_mask(_\d)?)"
)
# What stands in a record for a value that JSON does not hold.
UNKEPT = "not kept by lowtide"


def call_values(pipe: Any, request: Request) -> dict[str, Any]:
    """The arguments that `request.call` adds, for one batch."""
    known = signature(pipe.__call__).parameters
    device = getattr(pipe, "_execution_device", None)
    values: dict[str, Any] = {}
    for name, value in request.call.items():
        _check_name(type(pipe).__name__, name, known)
        _check_once(name, request)
        each = _by_seed(name, _real(name, value), request)
        values[name] = each.to(device) if isinstance(each, Tensor) else each
    return values


def _check_once(name: str, request: Request) -> None:
    """What a field of the request says, `call` does not say again."""
    twin = SAME_AS.get(name)
    if twin is not None and getattr(request, twin) not in (None, ()):
        raise BadInput(f"found {twin}, and {name} in call", "one of them", "leave one out")


def _check_name(kind: str, name: str, known: Mapping[str, Parameter]) -> None:
    if name in OWN or name.startswith("callback"):
        way_out = f"set {OWN[name]} instead" if OWN.get(name) else "leave it out"
        raise BadInput(f"found {name} in call", "arguments that lowtide does not set", way_out)
    if name not in known:
        others = ", ".join(each for each in known if each not in OWN and "callback" not in each)
        raise BadInput(
            f"found {name} in call, which a {kind} does not take",
            f"some of {others}",
            "check the spelling",
        )


def _real(name: str, value: Any) -> Any:
    """The value with pictures in the place of their paths."""
    if isinstance(value, str) and Path(value).suffix.lower() in PICTURES:
        return _opened(name, Path(value))
    if isinstance(value, Mapping):
        if UNKEPT in value:
            raise BadInput(
                f"found no {name} for the call: it was given in Python ({value[UNKEPT]})",
                "values that a file can hold, such as paths of pictures",
                "give call again",
            )
        return {key: _real(name, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_real(name, each) for each in value]
    return value


def _opened(name: str, path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("L" if "mask" in name else "RGB")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"found {path} in call unreadable ({error})", f"a picture for {name}", "check its path"
        ) from error


def _by_seed(name: str, value: Any, request: Request) -> Any:
    """One value for each image, where an image has one; others as they are."""
    if not _OF_AN_IMAGE.fullmatch(name) or value is None:
        return value
    if isinstance(value, Tensor | np.ndarray):
        rows = [seed % len(value) for seed in request.seeds]
        return value[rows]
    several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not several:
        raise BadInput(f"found no {name} in call", "one at least", "leave it out, or give one")
    return request.by_seed(several)


def recorded(value: object) -> object:
    """What stands in JSON for a value that it does not hold: its kind and a hash of its content.

    `json.dumps` calls this. Equal values give equal texts, in any process.
    """
    if isinstance(value, Image.Image):
        return _unkept(f"{value.mode} {value.size}", value.tobytes())
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _unkept(f"{value.dtype} {tuple(value.shape)}", content)
    if isinstance(value, np.ndarray):
        return _unkept(f"{value.dtype} {value.shape}", np.ascontiguousarray(value).tobytes())
    return str(value)


def _unkept(kind: str, content: bytes) -> dict[str, str]:
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    return {UNKEPT: f"{kind}, {digest}"}
