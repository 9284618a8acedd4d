"""The evidence of a comparison as dataclasses, and the one place that turns it into JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lowtide.evaluation.environment import Environment
from lowtide.evaluation.gates import GateResult
from lowtide.evaluation.layer_bits import CheckpointContents
from lowtide.evaluation.layer_drift import LayerErrors, TemporalErrors
from lowtide.evaluation.scores import ModelScores
from lowtide.evaluation.timed_sampling import TrajectoryErrors

VERSION = 1


@dataclass(frozen=True)
class DriftEvidence:
    """How far a model is from the reference: the sample, the layers, the temporal features."""

    trajectory: TrajectoryErrors
    layers: LayerErrors
    temporal: TemporalErrors | None


@dataclass(frozen=True)
class ModelEvidence:
    """All measurements of one model; checkpoint: of lowtide's own models only.

    drift: None for the reference.
    """

    name: str
    source: str
    kind: str
    bytes: int
    seconds_per_step: float
    checkpoint: CheckpointContents | None
    drift: DriftEvidence | None
    scores: ModelScores


@dataclass(frozen=True)
class ComparisonEvidence:
    """A whole comparison; models are by key, and `reference` is one of the keys."""

    title: str
    command: str
    date: str
    environment: Environment
    request: Mapping[str, object]
    captions: Sequence[str] | None
    reference: str
    models: Mapping[str, ModelEvidence]
    gates: Sequence[GateResult]


def evidence_json(evidence: ComparisonEvidence) -> dict[str, Any]:
    """The contents of evidence.json."""
    tree = {
        "version": VERSION,
        "title": evidence.title,
        "command": evidence.command,
        "date": evidence.date,
        "environment": asdict(evidence.environment),
        "request": evidence.request,
        "captions": evidence.captions,
        "reference": evidence.reference,
        "models": {key: _model_json(model) for key, model in evidence.models.items()},
        "gates": [asdict(gate) for gate in evidence.gates],
    }
    return {name: _finite(value) for name, value in tree.items()}


def _model_json(model: ModelEvidence) -> dict[str, Any]:
    names = ("name", "source", "kind", "bytes", "seconds_per_step")
    tree = {name: getattr(model, name) for name in names}
    if model.checkpoint:
        tree |= _checkpoint_json(model.checkpoint)
    if model.drift:
        tree |= asdict(model.drift)
    return tree | asdict(model.scores)


def _checkpoint_json(checkpoint: CheckpointContents) -> dict[str, Any]:
    """The contents and the costs of the run in one object; unknown costs are left out."""
    tree = asdict(checkpoint)
    costs = tree.pop("costs") or {}
    return tree | {name: value for name, value in costs.items() if value is not None}


def _finite(tree: Any) -> Any:
    """The tree as plain JSON, which has no NaN and no infinity: such a number becomes null."""
    if isinstance(tree, Mapping):
        return {name: _finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
