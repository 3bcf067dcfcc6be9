"""The training loop: a method for several tasks on frozen towers, all tasks in every step.

A step takes a batch of each task, runs one image forward for the mixed batch and one text forward for all tasks'
classes, and sums the tasks' mean cross-entropies (Eq. 11). Its state is the step number, the method and the
optimizer's momentum; everything random is a function of seed and step. So a training that is interrupted goes on from
its checkpoint with the same numbers as without the interruption. In a process group, each worker takes its share of
every step's images and classes, and only the first one reports and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.clip.class_tokens import ClassTokens
from pipeline.clip.precision import autocast
from pipeline.clip.towers import ClipTowers
from pipeline.config import TrainingConfig
from pipeline.errors import UserError
from pipeline.training.batches import TrainingSet
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.memory import out_of_memory_explained
from pipeline.training.share import Share


@dataclass(frozen=True)
class StepRecord:
    """What a step measured; per task, in the order of the training sets."""

    step: int
    """From 1."""
    epoch: int
    """From 1."""
    learning_rate: float
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    """Share of the step's training images that were classified correctly."""


def num_steps_per_epoch(sets: Sequence[TrainingSet], batch_size: int) -> int:
    """Steps in which the largest task sees each of its images at least once."""
    return math.ceil(max(len(task.images) for task in sets) / batch_size)


def learning_rate(epoch: int, epochs: int, config: TrainingConfig) -> float:
    """Rate of an epoch (from 0), as Dassl: warm-up at a constant rate, then a cosine by epoch of period `epochs`."""
    if epoch < config.warmup_epochs:
        return config.warmup_rate
    return config.learning_rate * (1 + math.cos(math.pi * (epoch - config.warmup_epochs) / epochs)) / 2


def train(
    towers: ClipTowers,
    method: nn.Module,
    sets: Sequence[TrainingSet],
    tokens: ClassTokens,
    config: TrainingConfig,
    *,
    epochs: int,
    seed: int,
    precision: str = "auto",
    checkpoints: Path | None = None,
    on_step: Callable[[StepRecord, int], None] = lambda record, num_steps: None,
    snapshot: Callable[[], torch.Tensor] | None = None,
    snapshot_every: int = 1,
) -> tuple[list[StepRecord], list[tuple[StepRecord, torch.Tensor]]]:
    """Trains `method` in place on the tasks' `sets` (same order) with SGD.

    Args:
        method: gives, when called, the Adaptation of the same tasks.
        tokens: class tokens of the same tasks.
        checkpoints: folder for the whole state every config.checkpoint_every epochs, from which an interrupted
            training goes on.
        on_step: told each new step's record and the number of all steps.
        snapshot: reads something off the backward pass of every `snapshot_every`-th step, from the first.

    Returns:
        All steps' records, and the snapshots with their steps' records.

    Raises:
        UserError: a loss that is not finite, naming task and step; a checkpoint that cannot be written; out of memory.
    """
    device = towers.device
    optimizer = torch.optim.SGD(
        method.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    history: list[StepRecord] = []
    snapshots: list[tuple[StepRecord, torch.Tensor]] = []
    if checkpoints and (state := load_checkpoint(checkpoints)):
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        history = [StepRecord(*values) for values in state["history"]]
        snapshots = [(history[at], value) for at, value in zip(state["snapshot_at"], state["snapshots"])]

    per_epoch = num_steps_per_epoch(sets, config.batch_size)
    num_steps = epochs * per_epoch
    share = Share.of_this_process()
    parts = share.parts([config.batch_size] * len(sets))
    images_per_task = [part.stop - part.start for part in parts]
    own_tokens = tokens.rows(*share.rows(len(tokens.suffix)))
    memory = out_of_memory_explained(
        device,
        f"training: lower clip.activations_gib={towers.activations_gib:g} or training.batch_size={config.batch_size}, "
        "or train fewer at once (a larger cluster.gpus_per_training, or on CPUs cluster.cpus_per_training)",
    )
    for step in range(len(history), num_steps):
        epoch = step // per_epoch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, epochs, config)
        with memory:
            pixels, labels = zip(
                *(
                    task.batch(step, config.batch_size, towers.image_size, config.augmentation, seed, part)
                    for task, part in zip(sets, parts)
                )
            )
            with autocast(device, precision):
                adaptation = method()
                images = towers.normalize_pixels(torch.cat(pixels))
                x = adaptation.encode_image(towers, images, images_per_task)
                z = share.all_rows(adaptation.encode_text(towers, own_tokens), len(tokens.suffix))
            logits = [
                adaptation.logits(towers, x_task, z_task)
                for x_task, z_task in zip(x.split(images_per_task), z.split(tokens.classes_per_task))
            ]
            losses = torch.stack([F.cross_entropy(*pair, reduction="sum") for pair in zip(logits, labels)])
            losses = losses / config.batch_size
            optimizer.zero_grad()
            losses.sum().backward()
        hits = torch.stack([(of_task.argmax(1) == label).sum() for of_task, label in zip(logits, labels)])
        measured = torch.stack([losses.detach(), hits / config.batch_size])
        taken = snapshot() if snapshot and step % snapshot_every == 0 else measured.new_empty(0)
        share.add_up([*(parameter.grad for parameter in method.parameters()), measured, taken])

        record = StepRecord(step + 1, epoch + 1, optimizer.param_groups[0]["lr"], *map(tuple, measured.tolist()))
        for task, loss in zip(sets, record.losses):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of task {task.task!r} is {loss} at step {record.step}: lower "
                    f"training.learning_rate={config.learning_rate} or set clip.precision=float32"
                )
        history.append(record)
        if len(taken):
            snapshots.append((record, taken.float().cpu()))
        optimizer.step()

        if not share.first:
            continue
        if checkpoints and (step + 1) % (per_epoch * config.checkpoint_every) == 0 and step + 1 < num_steps:
            save_checkpoint(
                checkpoints,
                {
                    "method": method.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": [tuple(vars(past).values()) for past in history],
                    "snapshot_at": [past.step - 1 for past, _ in snapshots],
                    "snapshots": [value for _, value in snapshots],
                },
            )
        on_step(record, num_steps)
    return history, snapshots
