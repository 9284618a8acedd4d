"""Every method on three models of the zoo: quantized, saved, loaded and drawn on the device.

    PYTHONPATH=.:bench python -m gpu.methods --out methods.json

With few iterations. The images of the model that was quantized and of the one that was loaded must
be equal to the bit, on kernels and in plain torch; if not, the row says how far apart they are.
"""

import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gpu.part import Row, Sheet, compute_alike, distance, options

import lowtide
from lowtide import sampling
from lowtide.methods import METHODS, relevant_options
from lowtide.sampling.pipelines import Pipeline

Json = dict[str, Any]
CONDITIONS: dict[str, Json] = {
    "zoo:digits": {},
    "zoo:dit": {"labels": (1, 5), "guidance": 2.0},
    "zoo:emoji": {"prompts": ("rocket", "cat face"), "guidance": 4.0},
}
STEPS = 4
OPTIONS: Json = {
    "steps": STEPS,
    "images": 4,
    "calibration_steps": 2,
    "iters": 20,
    "batch": 4,
}
TINY = ("minmax", "tfmq")
FEW: Json = {"steps": 2, "images": 2, "calibration_steps": 1, "iters": 1}


def drawn(pipe: Pipeline, request: sampling.Request, *, fused: bool) -> np.ndarray:
    if fused:
        return np.asarray(sampling.images(pipe, request))
    with lowtide.unfused(pipe):
        return np.asarray(sampling.images(pipe, request))


def same_state(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    """Whether codes, tables and floats are equal to the bit."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(value.cpu(), theirs[name].cpu()) for name, value in ours.items()
    )


def round_trip(model: str, method: str, device: torch.device, changes: Json) -> Row:
    wanted = OPTIONS | CONDITIONS[model] | changes
    request = sampling.Request(steps=wanted["steps"], seeds=(5, 6), batch=2, **CONDITIONS[model])
    started = time.monotonic()
    result = lowtide.quantize(
        model, method=method, device=str(device), **relevant_options(method, wanted)
    )
    row: Row = {"quantize_s": round(time.monotonic() - started, 2)}
    before = {fused: drawn(result.pipe, request, fused=fused) for fused in (True, False)}
    again = drawn(result.pipe, request, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        loaded = lowtide.load(folder, device=str(device))
    after = {fused: drawn(loaded, request, fused=fused) for fused in (True, False)}
    row["codes"] = same_state(result.model.state_dict(), sampling.denoiser(loaded).state_dict())
    row["repeated"] = bool(np.array_equal(again, before[True]))
    for fused, name in ((True, "kernels"), (False, "plain")):
        row[name] = bool(np.array_equal(before[fused], after[fused]))
        row[f"{name}_largest"] = float(np.abs(before[fused] - after[fused]).max())
    pair = [torch.from_numpy(before[fused]) for fused in (True, False)]
    row["kernels_from_plain"] = distance(*pair)
    unequal = [name for name in ("codes", "repeated", "kernels", "plain") if not row[name]]
    if not np.isfinite(before[True]).all():
        unequal.append("finite")
    return row | ({"failed": f"not the same: {', '.join(unequal)}"} if unequal else {})


def main(arguments: list[str] | None = None) -> int:
    """PASSED if every model is the same after loading."""
    sheet = Sheet("methods", options(__doc__.splitlines()[0], arguments, 120))
    compute_alike()
    methods = TINY if sheet.tiny else tuple(METHODS)
    changes = FEW if sheet.tiny else {}
    for model in list(CONDITIONS)[:1] if sheet.tiny else CONDITIONS:
        for method in methods:
            labels = {"model": model, "method": method}
            run = lambda m=model, by=method: round_trip(m, by, sheet.device, changes)  # noqa: E731
            sheet.measure(labels, run, 30)
    return sheet.code()


if __name__ == "__main__":
    sys.exit(main())
