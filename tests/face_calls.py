"""Right and wrong calls of the face, for a type checker. A line that ends in `# wrong` is an error."""

import torch
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import nn

import lowtide

pipe = DDIMPipeline.from_pretrained("digits")
quantized = lowtide.quantize(pipe, weights=4, inputs=8, steps=50)
quantized = lowtide.quantize("zoo:digits", method="tfmq", labels=range(3), prompts=["a cat"])
quantized = lowtide.quantize("zoo:digits", stages={"omq": {"plus": True}}, without=["tiar"])
folder = quantized.save("packed")
print(folder.name, quantized.plan.timesteps, quantized.report["seconds"])
loaded = lowtide.load("packed")
lowtide.save(loaded, "again")
lowtide.save(quantized, folder)
estimate = lowtide.plan("zoo:digits", fit="1MB", profile="paper")
print(estimate.seconds, estimate.size["total"], estimate.stages[0].name)
evaluation = lowtide.evaluate("packed", seeds=range(8), gates={"min-psnr": 25.0}, metrics=["psnr"])
evaluation = lowtide.compare("packed", pipe, quantized, reference="zoo:digits", out="evidence")
print(evaluation.report, evaluation.evidence.models["float"].psnr)
for gate in evaluation.evidence.gates:
    print(gate.name, gate.passed)
lowtide.reschedule("packed", 25)
lowtide.export("packed", "out", to="onnx")
lowtide.export("packed", "out", to="tensorrt")  # wrong
lowtide.recalibrate("packed", lora="style.safetensors", reference=pipe)
lowtide.quantize(pipe, fuse_lora=True)
lowtide.quantize(pipe, call={"negative_prompt": "blurry", "image": "cat.png"})
example = {"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.zeros(1)}
lowtide.quantize(nn.Linear(2, 2), example=example, scheduler=DDIMScheduler())
lowtide.load("packed", factory=lambda: nn.Linear(2, 2))
lowtide.reschedule("packed", 25, call={"image": "cat.png"})
images = lowtide.images(loaded, lowtide.Request(steps=50, seeds=(0, 1)))
print(images.shape)
images = lowtide.images(loaded, lowtide.Request(seeds=range(4), prompts=["a cat"], labels=[1]))
settings = lowtide.Settings(weights=2, scope="layer")
print(settings.calibration_batch)
try:
    lowtide.load("nowhere")
except lowtide.BadInput as error:
    print(error.found, error.expected, error.way_out)

lowtide.quantize(pipe, weight=4)  # wrong
lowtide.quantize(pipe, weights="4")  # wrong
lowtide.quantize(pipe, weights=9)  # wrong
lowtide.quantize(pipe, method="magic")  # wrong
lowtide.quantize(pipe, profile="half")  # wrong
lowtide.quantize(pipe, "tfmq")  # wrong
lowtide.quantize(3)  # wrong
lowtide.quantize(pipe, call=["blurry"])  # wrong
lowtide.load("packed", factory=3)  # wrong
lowtide.quantize()  # wrong
lowtide.plan("zoo:digits", fits="1MB")  # wrong
lowtide.plan("zoo:digits").second  # wrong
lowtide.evaluate("packed", seeds="0-3")  # wrong
lowtide.evaluate("packed", step=3)  # wrong
lowtide.compare("packed", out=3)  # wrong
lowtide.load()  # wrong
lowtide.save("packed")  # wrong
lowtide.reschedule("packed", steps="25")  # wrong
lowtide.Settings(weights="4")  # wrong
lowtide.Request(seed=(0,))  # wrong
lowtide.Request(seeds="0-3")  # wrong
quantized.store("packed")  # wrong
lowtide.quantise(pipe)  # wrong
