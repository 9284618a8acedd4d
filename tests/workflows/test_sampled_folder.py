"""Images in a folder: an interrupted command goes on to the same bytes, a finished one is done."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from packed_models import packed_and_float
from stopped_calls import Stopped, counted_calls

from lowtide import sampling
from lowtide.runtime.engines import Engines
from lowtide.workflows.sampled_folder import NAME, sample_to_folder

STEPS = 3
REQUEST = sampling.Request(steps=STEPS, seeds=(3, 5, 6), batch=2)
KINDS = {"float": 1, "packed": 0}


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def drawn(model, out, patch, stop=None, request=REQUEST) -> list[int]:
    """Sample, and how many images each call of the denoiser had."""
    with patch.context() as each:
        calls = counted_calls(each, stop)
        if stop is None:
            sample_to_folder(str(model), out, request)
        else:
            with pytest.raises(Stopped):
                sample_to_folder(str(model), out, request)
    return calls.counted


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return packed_and_float(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=KINDS)
def model(request, models):
    return models[KINDS[request.param]]


@pytest.fixture
def whole(model, tmp_path):
    """The images of a command that nobody stopped."""
    sample_to_folder(str(model), tmp_path / "whole", REQUEST)
    return images(tmp_path / "whole")


def test_finished_batches_are_not_drawn_again(model, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x"
    assert drawn(model, out, monkeypatch, stop=STEPS + 1) == [2] * STEPS + [1]
    assert not out.exists() and (tmp_path / "x.run").is_dir()
    capsys.readouterr()
    assert drawn(model, out, monkeypatch) == [1] * STEPS
    line = "going on where an earlier run stopped, with 1 finished parts\n"
    assert line in capsys.readouterr().err
    assert images(out) == whole and len(whole) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole", "x"]


def test_a_finished_command_says_so_and_draws_nothing(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x"
    first = sample_to_folder(str(model), out, REQUEST)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        calls = counted_calls(patch)
        assert sample_to_folder(str(model), out, REQUEST) == first
    assert calls.counted == []
    words = "holds these images: the same model, request and code. Nothing is done.\n"
    assert capsys.readouterr().err == f"{out} {words}"
    before = images(out)
    (out / "grid.png").write_bytes(b"altered")
    assert drawn(model, out, monkeypatch)
    assert images(out) == before
    (out / NAME).write_text("[]")
    assert drawn(model, out, monkeypatch)


CHANGES = {
    "seeds": {"seeds": (3, 5, 7)},
    "steps": {"steps": 2},
    "scheduler": {"scheduler": "euler"},
    "spacing": {"spacing": "trailing"},
    "batch": {"batch": 1},
    "eta": {"eta": 0.5},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_request_takes_no_old_batches(models, change, tmp_path, monkeypatch):
    model = models[KINDS["float"]]
    drawn(model, tmp_path / "x", monkeypatch, stop=STEPS + 1)
    other = sampling.Request(**{"steps": STEPS, "seeds": (3, 5, 6), "batch": 2} | CHANGES[change])
    counted = drawn(model, tmp_path / "x", monkeypatch, request=other)
    assert sum(counted) == other.steps * 3
    drawn(model, tmp_path / "whole", monkeypatch, request=other)
    assert images(tmp_path / "x") == images(tmp_path / "whole")


def test_another_model_takes_no_old_batches(models, tmp_path, monkeypatch):
    drawn(models[KINDS["float"]], tmp_path / "x", monkeypatch, stop=STEPS + 1)
    counted = drawn(models[KINDS["packed"]], tmp_path / "x", monkeypatch)
    assert sum(counted) == STEPS * 3


def test_a_damaged_batch_is_drawn_again(model, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x"
    drawn(model, out, monkeypatch, stop=STEPS + 1)
    (record,) = (tmp_path / "x.run").rglob("*.safetensors")
    data = bytearray(record.read_bytes())
    data[-9] ^= 4
    record.write_bytes(data)
    capsys.readouterr()
    assert drawn(model, out, monkeypatch) == [2] * STEPS + [1] * STEPS
    assert f"{record.name} of the interrupted run is damaged" in capsys.readouterr().err
    assert images(out) == whole


def test_after_a_kill_the_images_are_those_of_a_whole_run(models, tmp_path, monkeypatch):
    model = models[KINDS["packed"]]
    script = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import pytest\n"
        "from stopped_calls import counted_calls\n"
        "from lowtide import sampling\n"
        "from lowtide.workflows.sampled_folder import sample_to_folder\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"counted_calls(pytest.MonkeyPatch(), {STEPS + 1}, kill)\n"
        f"request = sampling.Request(steps={STEPS}, seeds=(3, 5, 6), batch=2)\n"
        f"sample_to_folder({str(model)!r}, {str(tmp_path / 'x')!r}, request)\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list((tmp_path / "x.run").rglob("*.safetensors"))) == 1
    assert drawn(model, tmp_path / "x", monkeypatch) == [1] * STEPS
    sample_to_folder(str(model), tmp_path / "whole", REQUEST)
    assert images(tmp_path / "x") == images(tmp_path / "whole")


def test_a_resumed_command_keeps_to_the_engines_of_its_start(models, tmp_path, monkeypatch):
    """The winner of a race may be another one in the next process."""
    model = models[KINDS["packed"]]
    chosen: list[str] = []

    def race_won_by(engine):
        def raced(self, step, shape, races, deadline):
            chosen.append(engine)
            self.layers[step.name].kernel = f"{engine}: it won"
            return engine

        monkeypatch.setattr(Engines, "_raced", raced)

    race_won_by("oneDNN")
    drawn(model, tmp_path / "x", monkeypatch, stop=STEPS + 1)
    drawn(model, tmp_path / "whole", monkeypatch)
    assert set(chosen) == {"oneDNN"}
    race_won_by("native")
    drawn(model, tmp_path / "x", monkeypatch)
    assert set(chosen) == {"oneDNN"}
    assert images(tmp_path / "x") == images(tmp_path / "whole")
