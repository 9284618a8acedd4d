"""EfficientDM: data-free fine-tuning at low bits (He et al., ICLR 2024, arXiv 2310.03270).

Block-by-block rounding fails below four bits, and retraining a diffusion model costs as much as
its first training. EfficientDM fine-tunes the whole quantized network against the float one along
the float trajectory, and needs no data. It learns two things: low-rank changes, which are rounded
together with the weights that they change so that only integers remain, and the scales; since
inputs drift with the step, each step has its own input scale.

    Y = Q(X, s_x) Q(W0 + B A, s_w)                 nn.lora.LoRA, merged by rounding once more
    L_t = || mu(x_t, t) - mu^(x_t, t) ||^2         stages.distill.Distill on eps; mu is linear in it
    scale-aware LoRA: the gradient times           Adam's rate times mean(s_w), because Adam ignores
    mean(s_w)                                      the scale of a gradient
    TALSQ, S_x = {s^0 .. s^{T-1}}                  Assign(per_step=True) and Distill(ranges=True),
                                                   one scale per timestep value
    initial scales                                 FitWeights("mse"), FitRanges("mse")

Departs from the paper: a batch mixes timesteps instead of following one trajectory. Guidance
branches are matched one by one, not as their mixture. Scales are learnt as logarithms. Input
scales learn faster than with the code's fixed 5e-4 where iterations are few: all rates grow as
iterations shrink. The last eighth of the calibration images is held out, and the result is kept
only if it is better there. Scales are not interpolated: for another schedule, `lowtide reschedule`
gives each step the nearest learnt scales.

Departs from the released code: the code adds LoRA to weights that are already rounded; here W0 is
the float weight. Shortcuts, downsampling and attention's q, k, v and softmax are quantized too
(profile `full`). Ranges are found by timestep, not by a step counter. As in the code, B of a
convolution is 1 x 1.
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
