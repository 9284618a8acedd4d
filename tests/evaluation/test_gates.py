"""Gates compare the right numbers with their limits."""

from lowtide.evaluation.gates import gate_results

LIMITS = {"min-psnr": 30.0, "max-lpips": 0.1, "max-fd-increase": 0.5}
NAMES = {"psnr": "psnr", "lpips": "lpips", "fd": "fd-efficientnet"}


def values(psnr, lpips, fd):
    return {"psnr": psnr, "lpips": lpips, "fd-efficientnet": fd}


def test_gates():
    nan = float("nan")
    models = {
        "float": {"fd-efficientnet": 10.0},
        "good": values(30.0, 0.1, 10.5),
        "bad": values(20.0, 0.3, 14.0),
        "broken": values(nan, nan, nan),
    }
    results = gate_results(LIMITS, models, reference="float", full_name=NAMES.__getitem__)
    passed = [(gate.name, gate.model) for gate in results if gate.passed]
    assert passed == [(name, "good") for name in LIMITS]
    assert len(results) == 9
    increases = {gate.model: gate.value for gate in results if gate.name == "max-fd-increase"}
    assert increases["bad"] == 4.0
