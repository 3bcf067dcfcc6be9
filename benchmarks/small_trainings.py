#!/usr/bin/env python
"""Several small trainings on one device: sequential, concurrent in one process, or in separate processes.

    python benchmarks/small_trainings.py                                       4 trainings of 1 task x 4 images
    python benchmarks/small_trainings.py --model ViT-B-16 --trainings 8 --classes 126

- sequential: one process, one training after another;
- threads: one process with one CLIP, a thread per training (on a GPU: a stream each);
- batched: one process, the trainings' tasks batched in every step, each with its own prompts: exact, since tasks
  interact only through shared prompts;
- processes: one per training, each with its own CLIP (as with fractional cluster.gpus_per_worker).
Each mode trains the same prompts for the same steps, and all must give the same result. Loading is not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median
from threading import Thread

import torch
import torch.nn.functional as F
from common import (
    ClipTowers,
    autocast,
    class_names,
    default_device,
    device_name,
    load,
    random_batch,
    table,
    write_results,
)
from torch import multiprocessing

from pipeline.clip.class_tokens import class_tokens
from pipeline.config import MmapConfig
from pipeline.methods.mmap import GroupMmap, MmapShape

TEMPLATE = "a photo of a {}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model name")
    parser.add_argument("--trainings", type=int, default=4)
    parser.add_argument("--images", type=int, default=4, help="batch size of a training, which has one task")
    parser.add_argument("--classes", type=int, default=65)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    towers = load(arguments.model, device)[1]
    numbers = range(arguments.trainings)
    cores = torch.get_num_threads()

    workers = [Worker(arguments, number, max(1, cores // arguments.trainings)) for number in numbers]
    seconds: dict[str, list[float]] = {}
    states: dict[str, list[torch.Tensor]] = {}
    for _ in range(arguments.repeats):
        for mode, run in (
            ("sequential", lambda: [train(towers, arguments, [number])[0] for number in numbers]),
            ("threads", lambda: train_in_threads(towers, arguments, numbers)),
            ("batched", lambda: train(towers, arguments, numbers)),
            ("processes", lambda: train_in_processes(workers)),
        ):
            start = time.perf_counter()
            states[mode] = run()
            seconds.setdefault(mode, []).append(time.perf_counter() - start)
    for worker in workers:
        worker.stop()

    rows = []
    for mode, prompts in states.items():
        difference = max((a - b).abs().max().item() for a, b in zip(prompts, states["sequential"]))
        rows.append({"mode": mode, "seconds": median(seconds[mode]), "difference": difference})
    setting = f"{arguments.trainings} trainings of 1 task x {arguments.images} images x {arguments.classes} classes"
    print(f"{arguments.model}, {setting}, {arguments.steps} steps, {device_name(device)}, torch {torch.__version__}\n")
    lines = [
        [row["mode"], f"{row['seconds']:.2f}", f"{rows[0]['seconds'] / row['seconds']:.2f}", f"{row['difference']:.0e}"]
        for row in rows
    ]
    print(table(["", "s", "speedup over sequential", "largest difference"], lines))
    write_results(f"small_trainings_{arguments.model}", device, {**vars(arguments), "rows": rows})


def train(towers: ClipTowers, arguments: argparse.Namespace, numbers: Sequence[int]) -> list[torch.Tensor]:
    """Run all steps of these trainings, batched, and return the source prompt of each one's group."""
    device, batch = towers.device, arguments.images
    shape = MmapShape.of(MmapConfig(), towers)
    prompts = [GroupMmap(shape, [f"task {number}"], seed=number).to(device) for number in numbers]
    optimizer = torch.optim.SGD([p for mmap in prompts for p in mmap.parameters()], lr=0.0035, momentum=0.9)
    names = class_names(arguments.classes)
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [names] * len(numbers)).to(device)
    batches = []
    for number in numbers:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            batches.append(random_batch(towers, batch, arguments.classes))
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    for _ in range(arguments.steps):
        with autocast(device, arguments.precision):
            adaptations = [mmap() for mmap in prompts]
            text = torch.cat([adaptation.text_prompts for adaptation in adaptations])
            vision = torch.cat([adaptation.vision_prompts for adaptation in adaptations])
            x = towers.encode_image(images, vision, [batch] * len(numbers)).split(batch)
            z = towers.encode_text(tokens, text).split(arguments.classes)
        losses = [F.cross_entropy(towers.logits(*pair), label) for *pair, label in zip(x, z, labels.split(batch))]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return [mmap.group.source.detach().cpu() for mmap in prompts]


def train_in_threads(towers: ClipTowers, arguments: argparse.Namespace, numbers: Sequence[int]) -> list[torch.Tensor]:
    results: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        is_cuda = towers.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream()) if is_cuda else nullcontext():
            results[number] = train(towers, arguments, [number])[0]

    threads = [Thread(target=run, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in numbers]


class Worker:
    """A process with its own CLIP that trains on request."""

    def __init__(self, arguments: argparse.Namespace, number: int, num_threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, worker_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(worker_pipe, arguments, number, num_threads))
        self.process.start()
        self.pipe.recv()

    def stop(self) -> None:
        self.pipe.send(False)
        self.process.join()


def _serve(pipe, arguments: argparse.Namespace, number: int, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    towers = load(arguments.model, torch.device(arguments.device))[1]
    pipe.send("ready")
    while pipe.recv():
        pipe.send(train(towers, arguments, [number])[0].numpy())


def train_in_processes(workers: Sequence[Worker]) -> list[torch.Tensor]:
    for worker in workers:
        worker.pipe.send(True)
    return [torch.from_numpy(worker.pipe.recv()) for worker in workers]


if __name__ == "__main__":
    main()
