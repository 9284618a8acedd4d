"""Recorded calls of the denoiser as tensors of one record, and back, to the same bits."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lowtide.models import Arguments
from lowtide.stages.call import Call

TEXT = "text"  # the tensor that holds the JSON of what stands where
IndexedCall = tuple[int, Call]  # with the number of its step


class _NotPlain(Exception):
    """A value that JSON does not hold."""


def tensors_of(calls: Sequence[IndexedCall]) -> dict[str, Tensor] | None:
    """The tensors of a record. A tensor that several calls share is in it once.

    None if an argument holds something else than tensors, plain values, lists and dicts.
    """
    tensors: dict[int, Tensor] = {}
    numbers: dict[int, int] = {}

    def plain(tree: object) -> object:
        if isinstance(tree, Tensor):
            number = numbers.setdefault(id(tree), len(numbers))
            tensors[number] = tree
            return {"tensor": number}
        if tree is None or isinstance(tree, bool | int | float | str):
            return {"value": tree}
        if type(tree) in (list, tuple):
            return {type(tree).__name__: [plain(each) for each in cast(Sequence[object], tree)]}
        if type(tree) is dict:
            return {"dict": {name: plain(each) for name, each in tree.items()}}
        raise _NotPlain

    try:
        text = [[index, call.timestep, plain(dict(call.arguments))] for index, call in calls]
    except _NotPlain:
        return None
    letters = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)
    # Tensors of one storage are apart on disk.
    named = {str(number): tensor.clone() for number, tensor in tensors.items()}
    return named | {TEXT: letters}


def calls_of(tensors: Mapping[str, Tensor]) -> list[IndexedCall]:
    """The calls of a record."""

    def real(tree: dict[str, Any]) -> object:
        ((kind, content),) = tree.items()
        if kind == "tensor":
            return tensors[str(content)]
        if kind == "value":
            return content
        if kind == "dict":
            return {name: real(each) for name, each in content.items()}
        return {"list": list, "tuple": tuple}[kind](real(each) for each in content)

    text = json.loads(bytes(tensors[TEXT].tolist()).decode())
    return [
        (index, Call(timestep, cast(Arguments, real(arguments)), kept=False))
        for index, timestep, arguments in text
    ]
