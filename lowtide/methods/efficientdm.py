"""EfficientDM: data-free fine-tuning of a quantized denoiser (He et al., ICLR 2024, arXiv 2310.03270).

Rounding block by block fails below four bits, and retraining a diffusion model costs what training it did. EfficientDM fine
tunes the whole quantized network against the float one along the float trajectory, needs no data, and learns little: low-rank
changes that are rounded together with the weights they change, so that nothing but integers remains, and the scales. Inputs
drift with the step, so each step has a scale of its own.

    Y = Q(X, s_x) Q(W0 + B A, s_w)                      nn.lora.LoRA, merged by rounding once more
    L_t = || mu(x_t, t) - mu^(x_t, t) ||^2              stages.distill.Distill, on eps, which mu is linear in
    scale-aware LoRA: the gradient times mean(s_w)      Adam's rate times mean(s_w): Adam does not see a gradient's scale
    TALSQ, S_x = {s^0 .. s^{T-1}}                       Assign(per_step=True) and Distill(ranges=True), keyed by timestep
    initial scales                                      FitWeights("mse"), FitRanges("mse")

Departs from the paper: batches mix timesteps instead of walking down a trajectory; guidance branches are matched one by one,
not as their mixture; scales are learnt as logarithms, input scales faster than the code's fixed 5e-4 where iterations are few
(all rates grow as iterations shrink); the last eighth of the calibration images is held out, and nothing is kept that does
worse there. Scales are not interpolated: `lowtide reschedule` gives each step of another schedule the nearest learnt ones.
Departs from the released code: it adds LoRA to weights already rounded, here W0 is the float weight; shortcuts, downsampling
and attention's q, k, v and softmax are quantized too (profile `full`); a convolution's B is 1 x 1, as there; no step counter.
"""

from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Recipe
from lowtide.stages.collect import Collect
from lowtide.stages.distill import Distill
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.pack import Pack


def recipe(settings: Settings) -> Recipe:
    return (
        Collect(),
        Assign(per_step=True),
        FitWeights("mse"),
        FitRanges("mse"),
        Distill(),
        Pack(),
    )
