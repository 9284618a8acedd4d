"""Train a zoo model: `python zoo/train.py digits`.

Every step draws its images, noise and timesteps from (seed, step) alone. Therefore a run that was
killed resumes from its last checkpoint and reaches the same weights (on a GPU, up to the order of
its sums). The result is the moving average of the weights in fp16, as an ordinary diffusers folder.
"""

import argparse
import json
from pathlib import Path

from training.catalogue import ZOO_MODELS
from training.export import export, model_folder
from training.trainer import Trainer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(ZOO_MODELS))
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data"),
        help="folder with mnist/, emoji64/, cifar10/, taef2/",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e9,
        help="stop after this time; run again to continue",
    )
    parser.add_argument("--out", type=Path, help="where checkpoints go (default: runs/zoo-NAME)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile on a CPU too; resume with the same choice, or the last bits differ",
    )
    parser.add_argument(
        "--export",
        action="store_true",
        help="only write the model's folder from the last checkpoint",
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    out = options.out or Path("runs") / f"zoo-{options.name}"
    trainer = Trainer(options.name, options.data, out, compiled=options.compile)
    trainer.resume()
    if not options.export:
        trainer.train(options.minutes)
    export(trainer, model_folder(options.name))
    summary = {
        "step": trainer.step,
        "loss": trainer.losses[-1:],
        "folder": f"zoo:{options.name}",
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
