"""Metrics by name: numbers, full names and origins; bad input is an error of one sentence."""

import json
import re
from typing import Any

import numpy as np
import pytest
from msgspec.structs import asdict
from tiny_networks import images, noisy, squares

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import (
    Measurement,
    Statistics,
    frechet,
    measure,
    measure_latents,
    pairs,
    per_image,
    sets,
)
from lowtide.evaluation.metrics.measurement import seed_ranges
from lowtide.evaluation.metrics.metric_names import full_name, names_with

CLEAN = images(40)
DAMAGED = noisy(CLEAN, 0.1)
SEEDS = range(40)


def measured(
    names: list[str], ours: Any = DAMAGED, reference: Any = CLEAN, **options: Any
) -> dict[str, Measurement]:
    return measure(ours, reference, names, **{"seeds": SEEDS, "extractor": squares()} | options)


def test_pairs_are_measured() -> None:
    metrics = measured(["ssim", "psnr"])
    assert list(metrics) == ["ssim", "psnr"]
    psnr = metrics["psnr"]
    assert psnr.value == pytest.approx(pairs.psnr(DAMAGED, CLEAN), rel=1e-12)
    assert metrics["ssim"].value == pytest.approx(pairs.ssim(DAMAGED, CLEAN), rel=1e-12)
    each = per_image(DAMAGED, CLEAN, ["psnr", "fd"])
    assert list(each) == ["psnr"]
    assert each["psnr"].mean() == psnr.value
    spread = 1.96 * each["psnr"].std() / np.sqrt(40)
    assert psnr.high - psnr.low == pytest.approx(2 * spread, rel=0.25)
    assert psnr.backend == "lowtide"
    assert psnr.weights is None
    assert psnr.higher_is_better


def test_one_image_has_no_interval() -> None:
    psnr = measured(["psnr"], DAMAGED[:1], CLEAN[:1], seeds=[0])["psnr"]
    assert (psnr.low, psnr.high) == (None, None)
    assert psnr.value == pytest.approx(pairs.psnr(DAMAGED[:1], CLEAN[:1]))


def test_sets_are_measured() -> None:
    extractor = squares()
    reference = images(60, seed=9)
    metrics = measured(["fd", "sfd", "kd", "precision", "recall"], reference=reference)
    ours = extractor(DAMAGED)
    theirs = extractor(reference)
    assert list(metrics) == ["fd-squares", "sfd-squares", "kd-squares", "precision", "recall"]
    expected = {
        "fd-squares": frechet(Statistics.of(ours.pooled), Statistics.of(theirs.pooled)),
        "sfd-squares": frechet(Statistics.of(ours.spatial), Statistics.of(theirs.spatial)),
        "kd-squares": sets.kernel_distance(ours.pooled, theirs.pooled),
        "precision": sets.precision(ours.pooled, theirs.pooled),
        "recall": sets.recall(ours.pooled, theirs.pooled),
    }
    values = {name: each.value for name, each in metrics.items()}
    assert values == pytest.approx(expected, rel=1e-12)
    assert all(each.low <= each.value <= each.high for each in metrics.values())
    assert all(each.low < each.high for each in metrics.values())
    distance = metrics["fd-squares"]
    origin = (distance.backend, distance.weights, distance.resize)
    assert origin == ("test", "sha256:0", "mean, 4")


def test_statistics_are_enough_for_a_distance() -> None:
    reference = images(60, seed=9)
    sums = squares().statistics([reference[:25], reference[25:]])
    of_sums = measured(["fd"], reference=sums)["fd-squares"]
    of_images = measured(["fd"], reference=reference)["fd-squares"]
    assert of_sums.value == pytest.approx(of_images.value, rel=1e-6)


def test_more_damage_is_more_distance() -> None:
    reference = images(400, seed=9)
    batches = [CLEAN * (1 - amount) for amount in (0.0, 0.3, 0.6)]
    metrics = [measured(["fd", "kd"], batch, reference) for batch in batches]
    for name in ("fd-squares", "kd-squares"):
        values = [each[name].value for each in metrics]
        assert values == sorted(values)
        assert values[2] > 1.5 * values[0]


def test_a_measurement_becomes_json() -> None:
    tree = asdict(measured(["psnr"], seeds=[*range(38), 90, 41])["psnr"])
    assert json.loads(json.dumps(tree)) == tree
    assert (tree["seeds"], tree["n"]) == ("0-37,41,90", 40)
    assert set(tree) == {
        "value",
        "low",
        "high",
        "n",
        "higher_is_better",
        "backend",
        "weights",
        "resize",
        "seeds",
    }


def test_ranges() -> None:
    lists = ([7], [0, 1, 2], [5, 0, 1, 9, 8])
    assert [seed_ranges(seeds) for seeds in lists] == ["7", "0-2", "0-1,5,8-9"]


def test_latents_of_any_shape() -> None:
    latents = np.random.default_rng(0).standard_normal((12, 4, 8, 8))
    error = measure_latents(latents + 0.5, latents, seeds=range(12))
    assert error.value == pytest.approx(0.25, rel=1e-12)
    assert not error.higher_is_better
    with pytest.raises(BadInput, match="expected one shape"):
        measure_latents(latents, latents[:6], seeds=range(12))


def test_inception_score_is_of_the_logits() -> None:
    logits = squares()(DAMAGED).logits
    score = measured(["is"], reference=None, extractor=squares("inception"))["is"]
    assert score.value == pytest.approx(sets.inception_score(logits), rel=1e-12)


def test_only_inception_is_called_fid() -> None:
    names = [full_name(name, "inception") for name in ("fd", "sfd", "kd", "is", "recall")]
    assert names == ["fid", "sfid", "kid", "is", "recall"]
    assert full_name("fd", "efficientnet") == "fd-efficientnet"
    assert not {"fid", "sfid", "kid", "is"} & names_with("efficientnet").keys()
    for name in ("fid", "sfid", "kid", "is"):
        wrong = f"found {name} with the extractor efficientnet"
        sentence = f"{wrong}; expected the extractor inception; choose it, or ask for fd"
        with pytest.raises(BadInput, match=sentence):
            measure(DAMAGED, CLEAN, [name], seeds=SEEDS)


TWO_SIZES = [np.zeros((8, 8, 3)), np.zeros((16, 16, 3))]
WITH_NAN = np.where(np.arange(40)[:, None, None, None] == 3, np.nan, CLEAN)
BAD = [
    (
        {"ours": TWO_SIZES, "seeds": [0, 1]},
        "found images of 8 x 8 x 3 and 16 x 16 x 3; expected one size",
    ),
    (
        {"ours": WITH_NAN},
        "found NaN or infinity in 1 of 40 images, first at place 3; expected finite images",
    ),
    ({"reference": WITH_NAN}, "found NaN or infinity in 1 of 40 images"),
    ({"ours": (CLEAN * 255).astype(np.uint8)}, "found uint8 images; expected floats in [0, 1]"),
    ({"ours": CLEAN * 2 - 1}, "expected images in [0, 1]; scale and clamp them"),
    (
        {"ours": CLEAN.transpose(0, 3, 1, 2)},
        "found images of shape (40, 3, 16, 16); expected N x height x width x 1 or 3",
    ),
    (
        {"reference": images(40, size=32)},
        "found images of 16 x 16 and a reference of 32 x 32; expected one resolution",
    ),
    (
        {"reference": CLEAN[:9]},
        "found 40 images and 9 of the reference; expected one reference image for each seed",
    ),
    ({"reference": None}, "found no reference; expected reference images"),
    ({"seeds": range(9)}, "found 9 seeds for 40 images"),
    ({"ours": CLEAN[:0], "reference": CLEAN[:0], "seeds": []}, "expected"),
    (
        {"names": ["fd"], "ours": CLEAN[:1], "seeds": [0]},
        "found 1 of the images that a Fréchet distance compares; expected at least 2",
    ),
    (
        {"names": ["kd"], "ours": CLEAN[:1], "seeds": [0]},
        "found 1 of the images that a kernel distance compares",
    ),
    (
        {"names": ["recall"], "ours": CLEAN[:3], "seeds": [0, 1, 2]},
        "found 3 of the images that precision and recall compare",
    ),
    (
        {"names": ["is"], "ours": CLEAN[:5], "seeds": range(5), "extractor": squares("inception")},
        "found 5 of the images of an inc",
    ),
    (
        {"names": ["kd"], "reference": squares().statistics([CLEAN])},
        "found a reference of statistics alone",
    ),
    (
        {"names": ["fd"], "reference": squares("other").statistics([CLEAN])},
        "found statistics of other pooled sha256:0",
    ),
    (
        {"names": ["fd"], "reference": squares().statistics([images(9, size=32)])},
        "a reference of 32 x 32; expected one resolution",
    ),
    ({"names": ["fvd"]}, "found metric 'fvd'; expected one of psnr, ssim"),
    (
        {"names": ["fd-dinov2"]},
        "found fd-dinov2 with the extractor squares; expected the extractor dinov2",
    ),
    (
        {"extractor": "vgg", "names": ["fd"]},
        "found extractor 'vgg'; expected one of efficientnet, inception, clip, dinov2",
    ),
]


@pytest.mark.parametrize(("case", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_input_says_so(case: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=re.escape(sentence)):
        measured(**{"names": ["psnr"]} | case)
