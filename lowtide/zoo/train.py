"""Train a zoo model: `python -m lowtide.zoo.train digits`.

Every step draws its images, noise and timesteps from (seed, step) alone, so a killed run resumes from its last
checkpoint to the same weights (on a GPU, up to the order of its sums). What ships is the moving average, in fp16, as an
ordinary diffusers folder.
"""

import argparse
import json
from pathlib import Path

from lowtide import zoo
from lowtide.zoo.export import export
from lowtide.zoo.specs import SPECS
from lowtide.zoo.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SPECS))
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with mnist/, emoji64/, cifar10/, taef2/"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long; run again to go on")
    parser.add_argument("--out", type=Path, help="where checkpoints go (default runs/zoo-NAME)")
    parser.add_argument("--compile", action="store_true", help="on a CPU too; resume as you began, or the last bits differ")
    parser.add_argument("--export", action="store_true", help="write the model's folder from the last checkpoint and stop")
    options = parser.parse_args()
    trainer = Trainer(options.name, options.data, options.out or Path("runs") / f"zoo-{options.name}", options.compile)
    trainer.resume()
    if not options.export:
        trainer.train(options.minutes)
    export(trainer, zoo.home(options.name))
    print(json.dumps({"step": trainer.step, "loss": trainer.losses[-1:], "folder": f"zoo:{options.name}"}))


if __name__ == "__main__":
    main()
