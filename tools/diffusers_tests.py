"""diffusers' own tests of quantizers, run on lowtide's: `make diffusers-tests`.

diffusers has a mixin that every quantizer of its own must pass. It lies beside diffusers' tests, so
it comes from a checkout (DIFFUSERS_SOURCE), not from the package. The mixin is written for an
accelerator; what is called here also runs on a CPU.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCE = Path(os.environ.get("DIFFUSERS_SOURCE", ROOT / "build" / "diffusers"))
sys.path[:0] = [str(SOURCE), str(ROOT / "tests")]

import tiny  # noqa: E402
from tests.models.testing_utils import quantization  # noqa: E402
from tests.testing_utils import torch_device  # noqa: E402

import lowtide  # noqa: E402
from lowtide.models import ARCHITECTURES  # noqa: E402
from lowtide.nn.packed import PackedConv2d, PackedLinear  # noqa: E402

MODELS = ("unet2d", "unet-text", "dit", "pixart", "sd3", "flux")
CONFIGS = {
    "W8A8": {"weights": 8, "inputs": 8},
    "W4A8": {"weights": 4, "inputs": 8},
    "W4A16": {"weights": 4, "inputs": 16},
}
# Each of these takes the arguments of a LowtideConfig.
CHECKS = (
    "quantization_num_parameters",
    "quantization_memory_footprint",
    "quantization_inference",
    "quantization_dtype_assignment",
    "quantization_lora_inference",
    "quantization_config_serialization",
    "original_dtype",
    "quantized_layers",
    "keep_modules_in_fp32",
    "quantization_cpu_device_map",
    "dequantize",
)
ACCELERATOR = pytest.mark.skipif(torch_device == "cpu", reason="diffusers asks for an accelerator")
# Whole parts of dotted names: unlike diffusers' own quantizers, ours takes no piece of a word.
EXCLUDED = {"unet2d": ["time_embedding"]}


class Tester(quantization.QuantizationTesterMixin):
    """The mixin around one model; pytest does not collect it, so its marks do not count."""

    __test__ = False

    def __init__(self, name: str, folder: Path):
        model = tiny.model(name)
        model.save_pretrained(folder)
        self.name = name
        self.model_class = type(model)
        self.pretrained_model_name_or_path = str(folder)
        self.inputs = dict(ARCHITECTURES[self.model_class].example(model, 2))
        self.inputs.pop("return_dict", None)

    def get_dummy_inputs(self):
        return dict(self.inputs)

    def _create_quantized_model(self, config_kwargs, **extra_kwargs):
        config = lowtide.LowtideConfig(**config_kwargs)
        options = {"quantization_config": config, "torch_dtype": torch.float32} | extra_kwargs
        return self.model_class.from_pretrained(self.pretrained_model_name_or_path, **options)

    def _verify_if_layer_quantized(self, name, module, config_kwargs):
        assert isinstance(module, PackedLinear | PackedConv2d), f"{name} is a {type(module)}"


@pytest.fixture(scope="module", params=MODELS)
def tester(request, tmp_path_factory):
    return Tester(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=CONFIGS)
def config(request):
    return dict(CONFIGS[request.param])


@pytest.mark.parametrize("check", CHECKS)
def test_quantizer(tester, config, check):
    getattr(tester, f"_test_{check}")(config)


@pytest.mark.parametrize("shards", [None, "auto"])
def test_serialization(tester, config, shards, tmp_path):
    tester._test_quantization_serialization(config, tmp_path, max_shard_size=shards)


def test_modules_to_not_convert(tester, config):
    excluded = EXCLUDED.get(tester.name, ["to_k"])
    tester._test_quantization_modules_to_not_convert(config, excluded)


@ACCELERATOR
def test_device_map(tester, config):
    tester._test_quantization_device_map(config)


@pytest.mark.xfail(reason="packed layers give no gradients", strict=True)
def test_training(tester, config):
    tester._test_quantization_training(config)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compile(tester, config, fullgraph):
    torch.compiler.reset()
    tester_of = quantization.QuantizationCompileTesterMixin._test_torch_compile
    tester_of(tester, config, fullgraph=fullgraph, error_on_recompile=True)
