"""The training loop: prompts of several tasks on frozen towers, all tasks in every step.

A step takes a batch of each task, runs one image forward for the mixed batch and one text forward for all tasks'
classes, and sums the tasks' mean cross-entropies (Eq. 11). Its state is the step number, the prompts and the
optimizer's momentum; everything random is a function of seed and step. So a training that is interrupted goes on from
its checkpoint with the same numbers as without the interruption.
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
from pipeline.clip.classifier import autocast
from pipeline.clip.towers import ClipTowers
from pipeline.config import TrainingConfig
from pipeline.errors import UserError
from pipeline.training.batches import TrainingSet
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint


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
    prompts: nn.Module,
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
    """Trains `prompts` in place on the tasks' `sets` (same order) with SGD.

    Args:
        prompts: gives, when called, text prompts (T, K, b, d_l) and vision prompts (T, K, b, d_v) of the same tasks.
        tokens: class tokens of the same tasks.
        checkpoints: folder for the whole state every config.checkpoint_every epochs, from which an interrupted
            training goes on.
        on_step: told each new step's record and the number of all steps.
        snapshot: reads something off the backward pass of every `snapshot_every`-th step, from the first.

    Returns:
        All steps' records, and the snapshots with their steps' records.

    Raises:
        UserError: a loss that is not finite, naming task and step; a checkpoint that cannot be written.
    """
    device = towers.device
    optimizer = torch.optim.SGD(
        prompts.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    history: list[StepRecord] = []
    snapshots: list[tuple[StepRecord, torch.Tensor]] = []
    if checkpoints and (state := load_checkpoint(checkpoints)):
        prompts.load_state_dict(state["prompts"])
        optimizer.load_state_dict(state["optimizer"])
        history = [StepRecord(*values) for values in state["history"]]
        snapshots = [(history[at], value) for at, value in zip(state["snapshot_at"], state["snapshots"])]

    per_epoch = num_steps_per_epoch(sets, config.batch_size)
    num_steps = epochs * per_epoch
    images_per_task = [config.batch_size] * len(sets)
    for step in range(len(history), num_steps):
        epoch = step // per_epoch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, epochs, config)
        pixels, labels = zip(
            *(task.batch(step, config.batch_size, towers.image_size, config.augmentation, seed) for task in sets)
        )
        with autocast(device, precision):
            text_prompts, vision_prompts = prompts()
            x = towers.encode_image(towers.normalize_pixels(torch.cat(pixels)), vision_prompts, images_per_task)
            z = towers.encode_text(tokens, text_prompts)
        logits = [
            towers.logits(x_task, z_task)
            for x_task, z_task in zip(x.split(images_per_task), z.split(tokens.classes_per_task))
        ]
        losses = torch.stack([F.cross_entropy(*pair) for pair in zip(logits, labels)])
        optimizer.zero_grad()
        losses.sum().backward()

        record = StepRecord(
            step + 1,
            epoch + 1,
            optimizer.param_groups[0]["lr"],
            tuple(losses.tolist()),
            tuple((of_task.argmax(1) == label).float().mean().item() for of_task, label in zip(logits, labels)),
        )
        for task, loss in zip(sets, record.losses):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of task {task.task!r} is {loss} at step {record.step}: lower "
                    f"training.learning_rate={config.learning_rate} or set clip.precision=float32"
                )
        history.append(record)
        if snapshot and step % snapshot_every == 0:
            snapshots.append((record, snapshot().float().cpu()))
        optimizer.step()

        if checkpoints and (step + 1) % (per_epoch * config.checkpoint_every) == 0 and step + 1 < num_steps:
            save_checkpoint(
                checkpoints,
                {
                    "prompts": prompts.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": [tuple(vars(past).values()) for past in history],
                    "snapshot_at": [past.step - 1 for past, _ in snapshots],
                    "snapshots": [value for _, value in snapshots],
                },
            )
        on_step(record, num_steps)
    return history, snapshots
