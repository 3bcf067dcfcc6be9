#!/usr/bin/env python
"""Training with frozen features, computed once and shared, or in every step.

    python benchmarks/frozen_features.py                        ViT-B/32, 16 images and 65 classes in a step
    python benchmarks/frozen_features.py --model ViT-B-16 --steps 8

Both sides run pipeline.training.trainer on the same images, and must end with the same weights. "In every step" runs
both towers in every step, frozen ones without a backward pass, as the authors' code does. Image features of a schedule
are computed once for all methods, groups and reruns: their seconds are a separate row.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median

import torch
from common import class_names, default_device, device_name, largest_difference, load, table, time_call, write_results

from pipeline.config import Config
from pipeline.methods.method import Method
from pipeline.methods.registry import METHODS
from pipeline.training.batches import TrainingSet
from pipeline.training.frozen_features import frozen_training_features
from pipeline.training.trainer import Trainer

COMPARED = ("coop", "lamm", "clip_adapter", "linear_probe", "vpt")


class RecomputedEveryStep(torch.nn.Module):
    """A method whose frozen parts look modified, so that every step computes them."""

    def __init__(self, method: torch.nn.Module, towers: torch.nn.Module):
        super().__init__()
        self.method, self.towers = method, (towers,)  # in a tuple, so that they are not submodules

    def forward(self):
        adaptation, (towers,) = self.method(), self.towers
        if adaptation.text_features:  # replace the text tower's; only the image tower is frozen
            no_prompts = torch.zeros(1, 1, 0, towers.vision_width, device=towers.device)
            return replace(adaptation, vision_prompts=no_prompts)
        return replace(adaptation, towers=towers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model name")
    parser.add_argument("--images", type=int, default=16, help="images per step")
    parser.add_argument("--classes", type=int, default=65)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the median counts")
    parser.add_argument("--methods", nargs="+", default=COMPARED)
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    _, towers = load(arguments.model, device)
    words, config = {"task": class_names(arguments.classes)}, Config()
    training = config.training.model_copy(update={"batch_size": arguments.images, "warmup_epochs": 0})
    generator = torch.Generator().manual_seed(0)
    count = arguments.images * arguments.steps
    images = tuple(
        torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8, generator=generator).to(device) for _ in range(count)
    )
    labels = torch.arange(count, device=device) % arguments.classes
    pixels = TrainingSet(("task",), images, (labels,))

    features = []
    writer = median(
        time_call(
            lambda: features.append(frozen_training_features(towers, pixels, arguments.steps, training, 1, "float32")),
            device,
        )
        for _ in range(arguments.repeats)
    )
    frozen = replace(pixels, frozen_features=features[0])
    rows = [{"method": "image features", "once": writer}]
    for name in arguments.methods:
        kind, seconds, states = METHODS[name], {"once": [], "every step": []}, {}
        tokens, frozen_tokens = (
            method.tokenize(config, towers.tokenizer, words).to(device) for method in (kind, Method)
        )
        options = {"epochs": 1, "seed": 1, "precision": "float32", "frozen_tokens": frozen_tokens}
        for _ in range(arguments.repeats):
            for side, side_seconds in seconds.items():
                method = kind.build(config, towers, words).to(device)
                trained = method if side == "once" else RecomputedEveryStep(method, towers)

                trainer = Trainer(towers, trained, [frozen], tokens, training, **options)
                side_seconds.append(time_call(trainer.train, device))
                states[side] = list(method.state_dict().values())
        row = {side: median(side_seconds) for side, side_seconds in seconds.items()}
        rows.append({"method": name, **row, "difference": largest_difference(*states.values())})
        print(rows[-1], flush=True)

    print(f"\n{arguments.model}, {arguments.steps} steps of {arguments.images} images, {arguments.classes} classes")
    print(f"{device_name(device)}, torch {torch.__version__}\n")
    lines = [
        [row["method"], f"{row['once']:.2f}"]
        + ([f"{row['every step']:.2f}", f"{row['every step'] / row['once']:.1f}"] if "every step" in row else ["", ""])
        for row in rows
    ]
    print(table(["training", "frozen part once, s", "in every step, s", "ratio"], lines))
    setting = {name: getattr(arguments, name) for name in ("model", "images", "classes", "steps")}
    write_results(f"frozen_features_{arguments.model}", device, {**setting, "rows": rows})


if __name__ == "__main__":
    main()
