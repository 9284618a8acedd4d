"""Comparison: models sample the same seeds, and their differences are measured and drawn.

    DIR/evidence.json              all measurements, as plain JSON
    DIR/images/<model>/<seed>.png
    DIR/report.html                one page, drawn from both

The package is not called `evaluate`: a module of that name would hide `lowtide.evaluate`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from lowtide import sampling
from lowtide.checkpoint import facts, file_format, folders, model_card, provenance
from lowtide.distributed.world import join
from lowtide.errors import BadInput
from lowtide.evaluation import compared_models, layer_drift
from lowtide.evaluation.compared_models import FLOAT, LOWTIDE, ComparedModel, ModelSource
from lowtide.evaluation.environment import environment
from lowtide.evaluation.gates import evaluation_settings, gate_results
from lowtide.evaluation.interrupted import digests_of, finished_evidence, resumed
from lowtide.evaluation.layer_bits import with_contents
from lowtide.evaluation.sampling_request import (
    image_captions,
    request_evidence,
    sampling_request,
)
from lowtide.evaluation.sampling_turns import sample_in_turns
from lowtide.evaluation.scores import (
    MeasurementPlan,
    ModelScores,
    measurement_plan,
    model_scores,
)
from lowtide.evaluation.timed_sampling import ModelSamples
from lowtide.report import evidence, page
from lowtide.report.evidence import Evidence, GateResult, Model
from lowtide.report.grids import write_rows
from lowtide.report.progress import track
from lowtide.report.verdict import brief_result
from lowtide.report.wording import figures
from lowtide.settings import EvaluationSettings
from lowtide.stages.finished_work import folder_beside, remove_runs
from lowtide.validation import takes_options_of

__all__ = ["Evaluation", "compare", "compare_models", "evaluate", "evaluate_model"]

FOLDER = "evidence"
PICTURED = 8  # images in a row of the model card's picture


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The result of a comparison: its evidence, and the folder that holds it."""

    evidence: Evidence
    folder: Path

    def __repr__(self) -> str:
        """Evaluation(digits in float: 2.24 MB; tfmq W4A8: 0.612 MB, PSNR 33.5 dB; in evidence)"""
        models = [brief_result(model) for model in self.evidence.models.values()]
        return f"Evaluation({'; '.join([*models, f'in {self.folder}'])})"

    @property
    def report(self) -> Path:
        """The page that shows the evidence."""
        return self.folder / page.NAME

    def as_json(self) -> dict[str, Any]:
        """The contents of evidence.json, and where the folder and the report are."""
        places = {"folder": str(self.folder), "report": str(self.report)}
        return evidence.as_json(self.evidence) | places


@takes_options_of(EvaluationSettings)
def evaluate(
    model: ModelSource,
    *,
    reference: ModelSource | None = None,
    out: str | Path | None = None,
    gates: Mapping[str, float] | None = None,
    **options: object,
) -> Evaluation:
    """Compare a packed model with the float model it was made of, and write the evidence folder.

    Args:
        model: a packed folder, a pipeline, or lowtide.Quantized.
        reference: the float model; None is the one that the folder's lowtide.json names.
        out: the evidence folder; None is MODEL/evidence.
        gates: bounds such as {"min-psnr": 25.0, "max-lpips": 0.2, "max-fd-increase": 1.0}.

    The other keywords are the fields of `lowtide.EvaluationSettings`: `metrics`, by default psnr,
    ssim and latent_mse; `dataset`, a folder of images or an .npz file of Statistics, which some
    metrics need; `seeds`, by default 0 to 63; and steps, prompts, labels and more, by default as
    the model was quantized.

    Returns:
        The evidence, its folder, and the path of the report.

    Examples:
        >>> import lowtide, tempfile
        >>> quantized = lowtide.quantize("zoo:digits", method="minmax", steps=2, images=2)
        >>> folder = quantized.save(f"{tempfile.mkdtemp()}/packed")
        >>> result = lowtide.evaluate(folder, reference="zoo:digits", seeds=range(2))
        >>> result.report.name, result.evidence.models["minmax-w4a8"].psnr > 10
        ('report.html', True)
    """
    settings = evaluation_settings(gates, **options)
    return evaluate_model(model, settings, reference=reference, out=out)


def evaluate_model(
    source: ModelSource,
    settings: EvaluationSettings,
    *,
    reference: ModelSource | None = None,
    out: str | Path | None = None,
) -> Evaluation:
    """`evaluate` with its settings in one object."""
    plan = measurement_plan(settings)
    if out is not None:
        _check_place(Path(out))
    model = compared_models.load(source, settings.device)
    if model.kind == FLOAT:
        wrong = f"found a float model in {model.source}"
        raise BadInput(wrong, "a quantized one", "quantize it, or use lowtide compare")
    folder = Path(out) if out else _folder_inside(model)
    original = compared_models.reference_of(model, reference, settings.device)
    models = compared_models.distinct([original, model])
    title = f"{models[1].name} beside {models[0].name}"
    return _write_evidence(models, plan, settings, folder, title)


def _check_place(out: Path) -> None:
    """Raise, before any work, where the evidence cannot go."""
    join().of_first(lambda: folders.check_place(out, folders.EVIDENCE_MARKS))


def _folder_inside(model: ComparedModel) -> Path:
    """The evidence folder inside the model's own folder."""
    if model.folder is None:
        wrong = "found no folder to write to"
        raise BadInput(wrong, "a place for the evidence", "give out (--out)")
    return model.folder / FOLDER


@takes_options_of(EvaluationSettings)
def compare(
    *models: ModelSource,
    reference: ModelSource | None = None,
    out: str | Path = FOLDER,
    gates: Mapping[str, float] | None = None,
    **options: object,
) -> Evaluation:
    """Compare any float models, lowtide's checkpoints, and others that diffusers can load.

    Args:
        models: hub ids, folders, zoo:NAME, or loaded pipelines.
        reference: the model that all are compared with; None is the first float model, or the
            first model if none is in float.
        out: the evidence folder.

    The other arguments and the result are those of `evaluate`; None is the value with which the
    first packed model was quantized.

    Returns:
        The evidence, its folder, and the path of the report.

    Examples:
        >>> import lowtide, tempfile
        >>> quantized = lowtide.quantize("zoo:digits", method="minmax", steps=2, images=2)
        >>> place = f"{tempfile.mkdtemp()}/evidence"
        >>> result = lowtide.compare("zoo:digits", quantized, out=place, seeds=range(2))
        >>> list(result.evidence.models)
        ['digits-in-float', 'minmax-w4a8']
    """
    settings = evaluation_settings(gates, **options)
    return compare_models(models, settings, reference=reference, out=out)


def compare_models(
    sources: Sequence[ModelSource],
    settings: EvaluationSettings,
    *,
    reference: ModelSource | None = None,
    out: str | Path = FOLDER,
) -> Evaluation:
    """`compare` with its settings in one object."""
    plan = measurement_plan(settings)
    missing = [] if reference is None or reference in sources else [reference]
    every = [*missing, *sources]
    if len(every) < 2:
        wrong = f"found {len(every)} model"
        way_out = "name another, or use lowtide evaluate"
        raise BadInput(wrong, "at least two to compare", way_out)
    _check_place(Path(out))
    models = [compared_models.load(source, settings.device) for source in every]
    first = _first_float(models) if reference is None else every.index(reference)
    ordered = [models[first], *models[:first], *models[first + 1 :]]
    title = f"{len(models)} models beside one another"
    named = compared_models.distinct(ordered)
    return _write_evidence(named, plan, settings, Path(out), title)


def _first_float(models: Sequence[ComparedModel]) -> int:
    """The place of the first float model, else 0."""
    return next((place for place, model in enumerate(models) if model.kind == FLOAT), 0)


def _write_evidence(
    models: Sequence[ComparedModel],
    plan: MeasurementPlan,
    settings: EvaluationSettings,
    out: Path,
    title: str,
) -> Evaluation:
    """Sample, measure, write. The folder appears as a whole or not at all."""
    request = sampling_request(models, settings)
    world = join()
    runs = world.of_first(lambda: folder_beside(out))
    digests = world.of_first(lambda: digests_of(models, request, plan, title))
    if done := world.of_first(lambda: finished_evidence(out, digests)):
        return Evaluation(done, out)
    models, request = compared_models.sampled_alike(models, request)
    compared_models.check_comparable(models)
    for model in models:
        facts.check_steps(model.denoiser, request.steps)
    # Wrong prompts and labels are an error here, before any sampling.
    captions = image_captions(models[0].pipe, request)
    with (
        world.inside(folders.written_beside(out, folders.EVIDENCE_MARKS)) as fresh,
        resumed(models, out, digests) as work,
    ):
        samples = sample_in_turns(models, request, fresh and fresh / "images", work)
        comparison = world.of_first(
            lambda: _evidence(title, models, plan, request, samples, captions)
        )
        comparison = replace(comparison, run=digests and digests.evidence)
        if fresh is not None:
            evidence.write(comparison, fresh)
            page.draw(fresh)
    if world.first:
        remove_runs(runs)
        _tell_in_card(models, comparison, out)
    return Evaluation(comparison, out)


def _tell_in_card(models: Sequence[ComparedModel], comparison: Evidence, out: Path) -> None:
    """Write the numbers, and a picture, into the model cards of the packed folders."""
    for model in models:
        if model.folder is None or model.kind != LOWTIDE:
            continue
        if model_card.evidence_in(model.folder) is None:
            continue
        metrics = comparison.models[model.key].metrics
        values = {name: figures(each.value) for name, each in metrics.items()}
        images = str(len(comparison.request.seeds))
        row = {"images": images, "steps": str(comparison.request.steps), **values}
        picture = _picture(model.key, model.folder, comparison, out)
        model_card.add_evidence(model.folder, {comparison.base.name: row}, picture)


def _picture(key: str, folder: Path, comparison: Evidence, out: Path) -> str:
    """Draw the first images of the reference and of the model; returns the picture's caption."""
    seeds = comparison.request.seeds[:PICTURED]
    homes = [out / "images" / each for each in (comparison.reference, key)]
    rows = [[home / f"{seed}.png" for seed in seeds] for home in homes]
    if not all(path.is_file() for path in chain.from_iterable(rows)):
        return ""
    with folders.written_file(folder / file_format.PICTURE) as fresh:
        write_rows(fresh, rows)
    return f"Above: {comparison.base.name}. Below: this model, from the same seeds."


def _evidence(
    title: str,
    models: Sequence[ComparedModel],
    plan: MeasurementPlan,
    request: sampling.Request,
    samples: Mapping[str, ModelSamples],
    captions: list[str] | None,
) -> Evidence:
    """All measurements; the first model is the reference."""
    reference = models[0]
    scores = model_scores(plan, models, samples, request.seeds, captions)
    entries = {model.key: _entry(model, samples[model.key], scores[model.key]) for model in models}
    return Evidence(
        title=title,
        command=provenance.command(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment(),
        request=request_evidence(request, reference.pipe.scheduler),
        captions=captions,
        reference=reference.key,
        models=_with_drift(entries, models, request, samples),
        gates=_gates(plan, scores, reference.key),
    )


def _entry(model: ComparedModel, samples: ModelSamples, scores: ModelScores) -> Model:
    """One model without its drift from the reference."""
    entry = Model(
        name=model.name,
        source=model.source,
        kind=model.kind,
        bytes=model.bytes,
        seconds_per_step=samples.seconds_per_step,
        metrics=scores.metrics,
        per_image=scores.per_image,
    )
    return with_contents(entry, model)


def _with_drift(
    entries: Mapping[str, Model],
    models: Sequence[ComparedModel],
    request: sampling.Request,
    samples: Mapping[str, ModelSamples],
) -> dict[str, Model]:
    """The entries with the drift of the sample, the layers and the temporal features."""
    reference, *others = models
    adapter = layer_drift.reference_adapter(reference, request)
    calls = layer_drift.reference_calls(reference, request, samples[reference.key].calls)
    drifting = dict(entries)
    for model in track(others, total=len(others), title="comparing layers"):
        drifting[model.key] = replace(
            entries[model.key],
            trajectory=samples[model.key].trajectory(),
            layers=layer_drift.layer_errors(
                adapter, reference.denoiser, model.denoiser, calls, skip=model.plan.blank
            ),
            temporal=layer_drift.temporal_drift(adapter, reference, model),
        )
    return drifting


def _gates(
    plan: MeasurementPlan, scores: Mapping[str, ModelScores], reference: str
) -> list[GateResult]:
    values = {key: _values(each) for key, each in scores.items()}
    return gate_results(plan.limits, values, reference=reference, full_name=plan.full_name)


def _values(scores: ModelScores) -> dict[str, float]:
    return {name: measurement.value for name, measurement in scores.metrics.items()}
