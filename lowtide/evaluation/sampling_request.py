"""The request of a comparison: what the settings say, else what a model was calibrated for."""

from collections.abc import Sequence
from dataclasses import replace

from lowtide import sampling
from lowtide.checkpoint import provenance
from lowtide.evaluation.compared_models import ComparedModel
from lowtide.report.evidence import Sampling
from lowtide.sampling.pipelines import Pipeline, Scheduler
from lowtide.settings import EvaluationSettings
from lowtide.validation import as_tuple, check

SEEDS = tuple(range(64))
# The fields of a request that the record of a quantized model contains.
_RECORDED = (
    "steps", "prompts", "labels", "guidance", "eta", "size", "pictures", "scheduler", "spacing",
    "call",
)  # fmt: skip


def sampling_request(
    models: Sequence[ComparedModel], settings: EvaluationSettings
) -> sampling.Request:
    """The settings, else the calibration of the first packed model, else 50 steps, seeds 0-63."""
    fields = _calibrated_steps(models) | _recorded_fields(models) | settings.request_fields
    return replace(sampling.Request(seeds=SEEDS), **fields)


def _calibrated_steps(models: Sequence[ComparedModel]) -> dict[str, object]:
    """The steps in the plan of the first packed model; it has them without a lowtide.json too."""
    summaries = [model.plan.summary for model in models if model.plan.summary]
    steps = next((summary["steps"] for summary in summaries if "steps" in summary), None)
    return {"steps": steps} if steps else {}


def _recorded_fields(models: Sequence[ComparedModel]) -> dict[str, object]:
    recorded = next((model.record.settings for model in models if model.record), {})
    names = [name for name in _RECORDED if recorded.get(name) not in (None, [], {})]
    fields = {name: as_tuple(recorded[name]) for name in names}
    check(EvaluationSettings, fields, title=f"in {provenance.NAME} ")
    return fields


def request_evidence(request: sampling.Request, scheduler: Scheduler) -> Sampling:
    return Sampling(
        seeds=tuple(request.seeds),
        prompts=tuple(request.prompts),
        labels=tuple(request.labels),
        steps=request.steps,
        batch=request.batch,
        guidance=request.guidance,
        eta=request.eta,
        scheduler=type(scheduler).__name__,
    )


def image_captions(pipe: Pipeline, request: sampling.Request) -> list[str] | None:
    """The prompt or the label of each seed; None for an unconditional model."""
    arguments = sampling.call_arguments(pipe, request)
    conditions = arguments.get("prompt", arguments.get("class_labels"))
    return None if conditions is None else [str(condition) for condition in conditions]
