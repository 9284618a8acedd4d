"""Models that draw one request in turns: the float model, and what was made of it."""

import io
import statistics
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from lowtide import sampling
from lowtide.checkpoint import facts
from lowtide.errors import BadInput
from lowtide.evaluation import compared_models
from lowtide.evaluation.compared_models import ComparedModel, ModelSource
from lowtide.evaluation.metrics import psnr
from lowtide.evaluation.sampling_request import sampling_request
from lowtide.evaluation.timed_sampling import SampledBatch, check_same_sampling, sample_batch
from lowtide.machine.device_names import AUTO
from lowtide.report.grids import pixels
from lowtide.settings import EvaluationSettings

Json = dict[str, object]
MOST_STEPS = 1000
_ASKED = ("prompt", "label", "seed", "steps", "guidance")


class Exhibit:
    """The float model and its quantized forms, ready to draw the same image.

    The first model is the reference. What a visitor does not say is as in the calibration.
    """

    def __init__(
        self,
        runs: Sequence[ModelSource],
        *,
        reference: ModelSource | None = None,
        device: str = AUTO,
    ):
        packed = [compared_models.load(run, device) for run in runs]
        if not packed:
            raise BadInput("found no model", "at least one", "name a folder that lowtide wrote")
        first = compared_models.reference_of(packed[0], reference, device)
        models = compared_models.distinct([first, *packed])
        compared_models.check_comparable(models)
        request = sampling_request(models, EvaluationSettings(seeds=(0,)))
        self.models, self.request = compared_models.sampled_alike(models, request)

    def describe(self) -> Json:
        """What a page needs before anything is drawn: the models, and what can be asked for."""
        fields = sampling.supported_fields(self.models[0].pipe)
        prompts = list(self.request.prompts)
        labels = list(self.request.labels)
        return {
            "models": [_facts_of(model) for model in self.models],
            "prompts": prompts if "prompts" in fields else None,
            "labels": labels or [0] if "labels" in fields else None,
            "guidance": self.request.guidance,
            "guided": "guidance" in fields,
            "steps": self.request.steps,
        }

    def draw(self, asked: Mapping[str, object]) -> Json:
        """One image of each model, in turns, with its time and its distance to the first."""
        request = self._request(asked)
        batches = [sample_batch(model.pipe, request) for model in self.models]
        first = batches[0]
        for batch in batches:
            check_same_sampling(batch, first)
        drawn = [_drawn(batch, first) for batch in batches]
        return {"images": drawn, "steps": request.steps, "seed": request.seeds[0]}

    def _request(self, asked: Mapping[str, object]) -> sampling.Request:
        if unknown := [name for name in asked if name not in _ASKED]:
            raise BadInput(f"found {unknown[0]!r}", f"some of {', '.join(_ASKED)}", "leave it away")
        changes: Json = {"seeds": (asked.get("seed", 0),), "batch": 1}
        if asked.get("prompt") is not None:
            changes["prompts"] = (asked["prompt"],)
        if asked.get("label") is not None:
            changes["labels"] = (asked["label"],)
        for name in ("steps", "guidance"):
            if asked.get(name) is not None:
                changes[name] = asked[name]
        request = replace(self.request, **changes)
        if request.steps > MOST_STEPS:
            raise BadInput(f"found {request.steps} steps", f"at most {MOST_STEPS}", "ask for fewer")
        return request


def _facts_of(model: ComparedModel) -> Json:
    weights = facts.parameter_bytes(model.denoiser)
    return {"name": model.name, "source": model.source, "bytes": weights}


def _drawn(batch: SampledBatch, reference: SampledBatch) -> Json:
    """One image as a PNG in a data URI; the reference itself has no PSNR."""
    distance = None if batch is reference else psnr(batch.images, reference.images)
    return {
        "image": _data_uri(batch.images),
        "width": batch.images.shape[2],
        "height": batch.images.shape[1],
        "seconds": sum(batch.seconds),
        "seconds_per_call": statistics.median(batch.seconds),
        "psnr": distance,
    }


def _data_uri(images: np.ndarray) -> str:
    image = pixels(images)[0]
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    file = io.BytesIO()
    picture.save(file, "png")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
