"""Engines: the same answers from native kernels and oneDNN, with and without a native library."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from fused_networks import Fused, Network
from test_fused import ONE_ROUNDING_APART, ROUNDED_ALIKE, Calls, answer, distance
from torch import nn

import lowtide
from lowtide import runtime
from lowtide.errors import BadInput
from lowtide.kernels import native_library, onednn, race
from lowtide.kernels.race import NATIVE, ONEDNN, PLAIN, Times
from lowtide.nn.swap import packed_layers
from lowtide.runtime import engines
from lowtide.runtime.onednn_layer import OneDnnLayer

pytestmark = pytest.mark.skipif(onednn.unsupported() != "", reason=onednn.unsupported())
needs_library = pytest.mark.skipif(
    native_library.native().library is None, reason=native_library.native().reason
)
MISSING = native_library.Native(None, "lowtide was installed without a C++ compiler")


@pytest.fixture(scope="module")
def ddim(tmp_path_factory) -> Calls:
    return Calls("ddim", tmp_path_factory.mktemp("ddim"))


@pytest.fixture
def engine(ddim):
    """Fuses the network with an engine, and with a free choice again after the test."""
    yield lambda name: runtime.fuse(ddim.model, name)
    runtime.fuse(ddim.model)


@pytest.fixture
def alone(ddim, monkeypatch) -> nn.Module:
    """A network that has not run yet, on a machine without a native library."""
    twin = not_run_yet(ddim)
    monkeypatch.setattr(native_library, "native", lambda: MISSING)
    return twin


def distances(calls: Calls) -> list[float]:
    pairs = zip(calls.answers(), calls.plain_answers(), strict=True)
    return [distance(*pair) for pair in pairs]


def kernels(calls: Calls) -> set[str]:
    return set(runtime.kernels_of(calls.model).values())


@needs_library
@pytest.mark.parametrize("name", ["ddim", "dit", "sd", "flux"])
def test_onednn_gives_the_answers_of_the_plain_layers(name, tmp_path):
    calls = Calls(name, tmp_path)
    native = calls.answers()
    runtime.fuse(calls.model, ONEDNN)
    found = distances(calls)
    assert min(found) < ROUNDED_ALIKE
    assert max(found) < ONE_ROUNDING_APART
    assert runtime.explain(calls.model)["torch"]["oneDNN"] > 10
    assert min(map(distance, calls.answers(), native)) < ROUNDED_ALIKE


@needs_library
def test_onednn_runs_gated_units():
    def forward(layers, x, time):
        hidden, gate = layers.a(x).chunk(2, -1)
        return layers.b(hidden * F.gelu(gate))

    torch.manual_seed(0)
    network = Network(forward, a=nn.Linear(16, 256), b=nn.Linear(128, 16))
    fused = Fused(network, 2, 10, 16)
    runtime.fuse(fused.model, ONEDNN)
    assert fused.check().names == ["Stream", "oneDNN", "Stream", "oneDNN"]


@needs_library
@pytest.mark.parametrize("options", [{"weights": 8}, {"weights": 2}, {"weights": 4, "group": 16}])
def test_onednn_at_other_bits(options, tmp_path):
    calls = Calls("ddim", tmp_path, **options)
    runtime.fuse(calls.model, ONEDNN)
    found = distances(calls)
    assert min(found) < ROUNDED_ALIKE
    assert max(found) < ONE_ROUNDING_APART


@needs_library
def test_a_forced_engine_runs_all_products(ddim, engine):
    engine(NATIVE)
    ddim.answers()
    assert "oneDNN" not in runtime.explain(ddim.model)["torch"]
    engine(ONEDNN)
    ddim.answers()
    assert "oneDNN: it was asked for" in kernels(ddim)
    native = [each for each in kernels(ddim) if each.startswith("native")]
    assert all(each.endswith("its inputs are in float") for each in native)
    engine(PLAIN)
    assert all(map(torch.equal, ddim.answers(), ddim.plain_answers()))


@needs_library
def test_an_image_has_the_same_bits_in_every_batch(ddim, engine):
    args, _ = ddim.calls[0]
    for name in (NATIVE, ONEDNN, None):
        engine(name)
        with torch.no_grad():
            both = answer(ddim.model(*args))
            alone = answer(ddim.model(args[0][:1], args[1]))
        assert torch.equal(both[:1], alone)


@needs_library
def test_a_copy_keeps_the_engine(ddim, engine):
    engine(ONEDNN)
    twin = copy.deepcopy(ddim.model)
    assert runtime.fused_forward(twin).engine == ONEDNN


@needs_library
def test_loading_with_an_engine(ddim, tmp_path):
    lowtide.save(ddim.pipe, tmp_path / "packed")
    loaded = lowtide.load(tmp_path / "packed", engine="onednn")
    assert runtime.fused_forward(loaded.unet).engine == ONEDNN
    with pytest.raises(BadInput, match=r"found engine 'gpu'; expected one of native, onednn"):
        lowtide.load(tmp_path / "packed", engine="gpu")


# The race


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Replaces the race by one with these times; returns the shapes that were raced."""
    raced: list[str] = []

    def replace(native: float, other: float) -> list[str]:
        def run(step, geometry) -> Times:
            raced.append(step.name)
            return Times(native, other)

        monkeypatch.setattr(engines, "race", run)
        monkeypatch.setattr(race, "cache_folder", lambda: tmp_path / "cache")
        return raced

    return replace


def not_run_yet(calls: Calls) -> nn.Module:
    """A copy that has not run yet."""
    twin = copy.deepcopy(calls.model)
    for _, layer in packed_layers(twin):
        layer.kernel = ""
        layer.hold_codes()
    return twin


@needs_library
@pytest.mark.parametrize(
    ("times", "winner"), [((3.0, 2.0), "oneDNN"), ((2.0, 3.0), "native"), ((2.1, 2.0), "native")]
)
def test_the_winner_runs_each_layer_and_says_why(ddim, made_up, times, winner):
    made_up(*times)
    twin = not_run_yet(ddim)
    args, _ = ddim.calls[0]
    with torch.no_grad():
        twin(*args)
    names = set(runtime.kernels_of(twin).values())
    raced = {name for name in names if "race" in name}
    assert all(name.startswith(winner) for name in raced)
    assert raced
    steps = runtime.explain(twin)["torch"]
    assert ("oneDNN" in steps) == (winner == "oneDNN")


@needs_library
def test_a_second_network_asks_the_file(ddim, made_up):
    raced = made_up(3.0, 2.0)
    args, _ = ddim.calls[0]
    first = not_run_yet(ddim)
    assert any("the first call races it" in each for each in runtime.kernels_of(first).values())
    with torch.no_grad():
        answer(first(*args))
        count = len(raced)
        second = not_run_yet(ddim)
        assert "oneDNN: the faster one in the race" in runtime.kernels_of(second).values()
        answer(second(*args))
    assert 0 < count == len(raced)
    assert runtime.kernels_of(first) == runtime.kernels_of(second)


@needs_library
def test_forced_engines_do_not_race(ddim, made_up):
    raced = made_up(3.0, 2.0)
    args, _ = ddim.calls[0]
    for name in (NATIVE, ONEDNN):
        twin = not_run_yet(ddim)
        runtime.fuse(twin, name)
        with torch.no_grad():
            twin(*args)
    assert raced == []


@needs_library
def test_without_onednn_nothing_races(ddim, made_up, monkeypatch):
    raced = made_up(3.0, 2.0)
    monkeypatch.setattr(onednn, "unsupported", lambda: "there is none")
    twin = not_run_yet(ddim)
    args, _ = ddim.calls[0]
    with torch.no_grad():
        twin(*args)
    assert raced == []
    names = runtime.kernels_of(twin).values()
    assert all(name.startswith(("native", "plain torch")) for name in names)


@needs_library
def test_a_shape_that_onednn_refuses_stays_native(ddim, made_up, monkeypatch):
    def refuse(*_) -> Times:
        raise RuntimeError("could not create a primitive\nmore lines")

    made_up(1.0, 1.0)
    monkeypatch.setattr(engines, "race", refuse)
    twin = not_run_yet(ddim)
    args, kwargs = ddim.calls[0]
    with torch.no_grad():
        twin(*args, **kwargs)
    names = runtime.kernels_of(twin).values()
    reasons = [name for name in names if not name.endswith("its inputs are in float")]
    assert reasons
    ending = "oneDNN fails on this shape (could not create a primitive)"
    assert all(each.endswith(ending) for each in reasons)


@needs_library
def test_races_end_when_their_time_is_used_up(ddim, made_up, monkeypatch):
    raced = made_up(3.0, 2.0)
    monkeypatch.setattr(engines, "SECONDS", 0.0)
    twin = not_run_yet(ddim)
    args, _ = ddim.calls[0]
    with torch.no_grad():
        twin(*args)
    assert raced == []
    assert any("the next goes on" in name for name in runtime.kernels_of(twin).values())


@needs_library
def test_a_real_race_times_both_engines(ddim, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "cache_folder", lambda: tmp_path)
    twin = not_run_yet(ddim)
    args, _ = ddim.calls[0]
    with torch.no_grad():
        found = answer(twin(*args))
        with lowtide.unfused(twin):
            assert distance(found, answer(twin(*args))) < ONE_ROUNDING_APART
    known = race.saved_races().known
    assert len(known) > 5
    assert all(0 < each.native < 1e6 and 0 < each.onednn < 1e6 for each in known.values())


# Layer by layer, where there is no native library


@pytest.fixture
def products(monkeypatch) -> list[bool]:
    """Whether each product on oneDNN gave an answer."""
    answered: list[bool] = []
    call = OneDnnLayer.__call__

    def counted(layer: OneDnnLayer, x: torch.Tensor) -> torch.Tensor | None:
        output = call(layer, x)
        answered.append(output is not None)
        return output

    monkeypatch.setattr(OneDnnLayer, "__call__", counted)
    return answered


def test_without_a_library_the_products_run_on_onednn(ddim, alone, products):
    args, _ = ddim.calls[0]
    expected = f"UNet2DModel runs layer by layer: {MISSING.reason}; oneDNN runs its products."
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = answer(alone(*args))
        with lowtide.unfused(alone):
            plain = answer(alone(*args))
    assert [str(each.message) for each in caught] == [expected]
    assert distance(found, plain) < ONE_ROUNDING_APART
    assert len(products) > 30
    assert all(products)
    assert all(layer.product is None for _, layer in packed_layers(alone))
    assert f"oneDNN: {MISSING.reason}" in runtime.kernels_of(alone).values()


def test_without_a_library_other_engines_stay_plain(ddim, alone, products):
    runtime.fuse(alone, NATIVE)
    args, _ = ddim.calls[0]
    with torch.no_grad(), pytest.warns(UserWarning, match="without a C\\+\\+ compiler\\.$"):
        found = answer(alone(*args))
    with torch.no_grad(), lowtide.unfused(alone):
        assert torch.equal(found, answer(alone(*args)))
    assert products == []


def test_without_a_library_nan_spreads_as_in_the_plain_layers(ddim, alone, products):
    args, _ = ddim.calls[0]
    x = args[0].clone()
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = answer(alone(x, args[1]))
        with lowtide.unfused(alone):
            assert torch.equal(found.isnan(), answer(alone(x, args[1])).isnan())
    assert not all(products)


def test_without_a_library_gradients_and_training_stay_plain(ddim, alone, products):
    args, _ = ddim.calls[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = args[0].clone().requires_grad_()
        assert answer(alone(x, args[1])).requires_grad
        alone.train()
        with torch.no_grad():
            alone(*args)
    assert products == []
