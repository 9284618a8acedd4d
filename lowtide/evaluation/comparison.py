"""Evidence: float and quantized models draw the same seeds, and what differs is measured, drawn and gated.

The package is not called `evaluate`, because a module of that name would take the place of `lowtide.evaluate`.

    DIR/evidence.json            everything measured, as plain JSON
    DIR/images/<model>/<seed>.png
    DIR/report.html              one page drawn from the two above
"""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowtide import sampling
from lowtide.checkpoint import facts, folders, provenance
from lowtide.errors import BadInput
from lowtide.evaluation import environment, layer_drift, timed_sampling
from lowtide.evaluation.compared_models import (
    FLOAT,
    OURS,
    Source,
    Subject,
    check_alike,
    distinct,
    load,
    reference_of,
)
from lowtide.evaluation.layer_bits import made
from lowtide.evaluation.scores import Ruler, judged, ruler, scored
from lowtide.report import page, text

__all__ = ["compare", "evaluate"]

VERSION, MARK, HERE = 1, "evidence.json", "evidence"


def evaluate(
    model: Source,
    *,
    reference: Source | None = None,
    out: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    dataset: str | Path | None = None,
    gates: Mapping[str, float] | None = None,
    **request: Any,
) -> dict[str, Any]:
    """Compare a packed model with the float model it was made of, and write the evidence folder.

    model: a packed folder (or a pipeline, or lowtide.Quantized). reference: the float model; without it, the one that the
    folder's lowtide.json names. out: the evidence folder, MODEL/evidence by default. metrics: psnr, ssim, lpips, latent_mse;
    against `dataset` (a folder of images, or an .npz of lowtide.metrics' Statistics): fd, sfd, kd, precision, recall, fid, ...
    gates: bounds such as {"min-psnr": 25.0, "max-lpips": 0.2, "max-fd-increase": 1.0}. request: fields of lowtide.Request,
    such as seeds and steps; what is not given is as the model was quantized.

    Returns what evidence.json holds, with the folder and the path of the report.
    """
    rule = ruler(metrics, dataset, gates or {})
    subject = load(model)
    if subject.kind == FLOAT:
        raise BadInput(
            f"found a float model in {subject.source}",
            "a quantized one",
            "quantize it, or use lowtide compare",
        )
    if out is None and subject.folder is None:
        raise BadInput(
            "found no folder to write to", "a place for the evidence", "give out (--out)"
        )
    subjects = distinct([reference_of(subject, reference), subject])
    title = f"{subjects[1].name} beside {subjects[0].name}"
    return prove(subjects, rule, Path(out or subject.folder / HERE), title, request)


def compare(
    *models: Source,
    reference: Source | None = None,
    out: str | Path = HERE,
    metrics: Sequence[str] | None = None,
    dataset: str | Path | None = None,
    gates: Mapping[str, float] | None = None,
    **request: Any,
) -> dict[str, Any]:
    """Compare any mix of float models, lowtide's checkpoints and others that diffusers loads; arguments as for evaluate.

    All are compared with `reference`; without one, with the first float model, or, if there is none, with the first model.
    """
    rule = ruler(metrics, dataset, gates or {})
    together = ([] if reference is None or reference in models else [reference]) + list(models)
    if len(together) < 2:
        raise BadInput(
            f"found {len(together)} model",
            "at least two to compare",
            "name another, or use lowtide evaluate",
        )
    subjects = [load(model) for model in together]
    first = together.index(reference) if reference is not None else first_float(subjects)
    subjects = distinct([subjects[first], *subjects[:first], *subjects[first + 1 :]])
    return prove(subjects, rule, Path(out), f"{len(subjects)} models beside one another", request)


def first_float(subjects: Sequence[Subject]) -> int:
    return next((place for place, subject in enumerate(subjects) if subject.kind == FLOAT), 0)


def prove(
    subjects: Sequence[Subject], rule: Ruler, out: Path, title: str, asked: dict[str, Any]
) -> dict[str, Any]:
    """Draw, measure, write; the folder appears whole or not at all."""
    request = environment.asked_request(subjects, asked)
    check_alike(subjects)
    for subject in subjects:
        facts.check_steps(subject.model, request.steps)
    captions = environment.captions(subjects[0].pipe, request)
    with folders.written_beside(out, (MARK,)) as fresh:
        drawings = timed_sampling.draw_in_turns(subjects, request, fresh / "images", text.track)
        models = described(subjects, request, drawings)
        for key, found in scored(rule, subjects, drawings, request.seeds, captions).items():
            models[key] |= found
        data = head(title, subjects, request, captions) | {
            "models": models,
            "gates": judged(rule, models, subjects[0].key),
        }
        data = finite(data)
        (fresh / MARK).write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
        page.draw(fresh)
    return data | {"folder": str(out), "report": str(out / "report.html")}


def head(
    title: str, subjects: Sequence[Subject], request: sampling.Request, captions: list[str] | None
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "title": title,
        "command": provenance.command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment.environment(),
        "request": environment.request_told(request, subjects[0].pipe.scheduler),
        "captions": captions,
        "reference": subjects[0].key,
    }


def described(
    subjects: Sequence[Subject],
    request: sampling.Request,
    drawings: Mapping[str, timed_sampling.Drawing],
) -> dict[str, dict[str, Any]]:
    """What each model is, its speed, and where it leaves the reference's path."""
    first, *others = subjects
    adapter = layer_drift.reference_adapter(first)
    calls = layer_drift.reference_calls(first, request, drawings[first.key].calls)
    found = {first.key: basics(first, drawings[first.key])}
    for subject in text.track(others, len(others), "comparing layers"):
        away = {
            "trajectory": drawings[subject.key].trajectory(),
            "layers": layer_drift.layer_errors(
                adapter, first.model, subject.model, calls, skip=subject.plan.blank
            ),
            "temporal": layer_drift.temporal_drift(adapter, first, subject),
        }
        found[subject.key] = basics(subject, drawings[subject.key]) | away
    return found


def basics(subject: Subject, drawing: timed_sampling.Drawing) -> dict[str, Any]:
    names = ("name", "source", "kind", "bytes")
    told = {name: getattr(subject, name) for name in names} | {
        "seconds_per_step": drawing.seconds_per_step
    }
    return told | (made(subject) if subject.kind == OURS else {})


def finite(tree: Any) -> Any:
    """Plain JSON has no NaN and no infinity; what was no number is null."""
    if isinstance(tree, Mapping):
        return {name: finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
