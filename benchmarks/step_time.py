#!/usr/bin/env python
"""Time of one training step (forward and backward to the prompts), ours against the plain version, side by side.

    python benchmarks/step_time.py                                        all cases on ViT-B/16
    python benchmarks/step_time.py --model ViT-B-32 --cases 1x16x65       tasks x images of a task x classes

The plain version (tests/plain_towers.py) runs every class at 77 tokens, concatenates the prompts at every layer, and
takes one task after the other. Both train the same group and task prompts on random images with random weights (time
does not depend on weights) and are timed in turn. FLOPs are counted by torch's own counter. Prints a Markdown table
and writes benchmarks/results/step_time_<model>_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from plain_towers import plain_encode_image, plain_encode_text  # noqa: E402

from pipeline.clip.class_tokens import class_tokens  # noqa: E402
from pipeline.clip.torchvision_compat import ensure_torchvision  # noqa: E402
from pipeline.clip.towers import ClipTowers  # noqa: E402
from pipeline.config import MmapConfig  # noqa: E402
from pipeline.data.find import read_class_names  # noqa: E402
from pipeline.methods.mmap import GroupMmap, MmapShape  # noqa: E402

TEMPLATE = "a photo of a {}."
CLASS_NAMES = {65: "office_home", 126: "mini_domainnet"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip model name")
    parser.add_argument("--cases", nargs="+", default=["1x16x65", "1x16x126", "1x4x126", "4x16x65"])
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each; the fastest counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    ensure_torchvision()
    import open_clip

    model = open_clip.create_model(arguments.model).eval()
    towers = ClipTowers(model, open_clip.get_tokenizer(arguments.model)).to(device)

    rows = []
    for case in arguments.cases:
        num_tasks, batch, num_classes = map(int, case.split("x"))
        ours, plain = steps(towers, model, num_tasks, batch, num_classes)
        difference = largest_difference(ours(), plain())
        row = {"tasks": num_tasks, "images of a task": batch, "classes": num_classes, "difference": difference}
        for name, step in (("plain", plain), ("ours", ours)):
            with FlopCounterMode(display=False) as counter:
                step()
            row[f"{name} GFLOP"] = counter.get_total_flops() / 1e9
        seconds = {"plain": [], "ours": []}
        for _ in range(arguments.repeats):
            for name, step in (("plain", plain), ("ours", ours)):
                seconds[name].append(timed(step, device))
        row |= {f"{name} s": min(values) for name, values in seconds.items()}
        rows.append(row)
        print(f"{case}: {row}", file=sys.stderr, flush=True)

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{arguments.model}, float32, {where}, torch {torch.__version__}, fastest of {arguments.repeats}\n")
    print("| tasks x images x classes | plain GFLOP | ours GFLOP | ratio | plain s | ours s | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        gflop, times = (row["plain GFLOP"], row["ours GFLOP"]), (row["plain s"], row["ours s"])
        print(
            f"| {row['tasks']} x {row['images of a task']} x {row['classes']} "
            f"| {gflop[0]:.0f} | {gflop[1]:.0f} | {gflop[0] / gflop[1]:.1f} "
            f"| {times[0]:.2f} | {times[1]:.2f} | {times[0] / times[1]:.1f} |"
        )
    file = REPOSITORY / "benchmarks" / "results" / f"step_time_{arguments.model}_{device.type}.json"
    file.parent.mkdir(exist_ok=True)
    machine = {"device": where, "torch": torch.__version__, "processor": platform.machine()}
    file.write_text(json.dumps({**machine, "model": arguments.model, "rows": rows}, indent=1) + "\n")


def steps(
    towers: ClipTowers, model: torch.nn.Module, num_tasks: int, batch: int, num_classes: int
) -> tuple[Callable[[], list[torch.Tensor]], Callable[[], list[torch.Tensor]]]:
    """Our step and the plain one; each returns the gradients of all prompt parameters."""
    device = towers.device
    tasks = [f"task {number}" for number in range(num_tasks)]
    prompts = GroupMmap(MmapShape.of(MmapConfig(), towers), tasks, seed=1).to(device)
    names = read_class_names(REPOSITORY / "configs" / "class_names" / f"{CLASS_NAMES[num_classes]}.txt")
    words = list(names.values())
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [words] * num_tasks).to(device)
    ids = towers.tokenizer([TEMPLATE.format(name) for name in words]).to(device)
    size = towers.image_size
    images = torch.randn(num_tasks * batch, 3, size, size, device=device)
    labels = torch.arange(num_tasks * batch, device=device) % num_classes
    parameters = list(prompts.parameters())

    def ours() -> list[torch.Tensor]:
        text, vision = prompts()
        x = towers.encode_image(images, vision, [batch] * num_tasks).split(batch)
        z = towers.encode_text(tokens, text).split(num_classes)
        losses = [F.cross_entropy(towers.logits(*pair), label) for *pair, label in zip(x, z, labels.split(batch))]
        return list(torch.autograd.grad(sum(losses), parameters))

    def plain() -> list[torch.Tensor]:
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for t, (of_task, label) in enumerate(zip(images.split(batch), labels.split(batch))):
            text, vision = prompts()
            x = plain_encode_image(model, of_task, vision[t])
            z = plain_encode_text(model, ids, text[t])
            loss = F.cross_entropy(towers.logits(x, z), label)
            total = [a + b for a, b in zip(total, torch.autograd.grad(loss, parameters))]
        return total

    return ours, plain


def largest_difference(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> float:
    """Largest difference of two lists of gradients, relative to the largest gradient."""
    scale = max(gradient.abs().max() for gradient in plain)
    return max(((a - b).abs().max() / scale).item() for a, b in zip(ours, plain))


def timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
