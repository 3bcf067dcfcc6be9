"""The training loop: a method for several tasks on frozen towers, all tasks in every step.

A step takes a batch of each task, runs one image forward for the mixed batch and one text forward for all tasks'
classes, and sums the tasks' mean cross-entropies (Eq. 11). What a method leaves as the frozen CLIP has it is not
computed in the step: text features are computed once, image features come with the training sets. Its state is the
step number, the method and the optimizer's; everything random is a function of seed and step. So a training that is
interrupted goes on from its checkpoint with the same numbers as without the interruption. In a process group, each
worker takes its share of every step's images and classes, and only the first one reports and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from pipeline.clip.class_tokens import ClassTokens
from pipeline.clip.precision import autocast
from pipeline.clip.towers import ClipTowers
from pipeline.config import TrainingConfig
from pipeline.errors import UserError
from pipeline.methods.adaptation import Consistency
from pipeline.training.batches import TrainingSet
from pipeline.training.checkpoint import Checkpoints
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


def num_steps_per_epoch(set_sizes: Iterable[int], batch_size: int) -> int:
    """Steps in which the largest task sees each of its images at least once."""
    return math.ceil(max(set_sizes) / batch_size)


def learning_rate(epoch: int, epochs: int, config: TrainingConfig) -> float:
    """Rate of an epoch (from 0), as Dassl: warm-up at a constant rate, then a cosine by epoch of period `epochs`."""
    if epoch < config.warmup_epochs:
        return config.warmup_rate
    return config.learning_rate * (1 + math.cos(math.pi * (epoch - config.warmup_epochs) / epochs)) / 2


@dataclass(frozen=True)
class Snapshot:
    """What the tasks' gradients were in a step."""

    record: StepRecord
    gradients: torch.Tensor
    """(T, P), float32."""
    point: torch.Tensor
    """(P,), float32: the method's parameters of which these are the gradients, in their order."""


Trained = tuple[list[StepRecord], list[Snapshot]]
"""All steps' records, and the snapshots."""


def train(*arguments: Any, **options: Any) -> Trained:
    """Trains a method in place to the end; arguments and faults are those of `train_by_epoch`."""
    return exhausted(train_by_epoch(*arguments, **options))


def exhausted(training: Generator[int, None, Trained]) -> Trained:
    """What a training by epochs returns at its end."""
    while True:
        try:
            next(training)
        except StopIteration as end:
            trained: Trained = end.value
            return trained


def train_by_epoch(
    towers: ClipTowers,
    method: nn.Module,
    sets: Sequence[TrainingSet],
    tokens: ClassTokens,
    config: TrainingConfig,
    *,
    epochs: int,
    seed: int,
    precision: str = "auto",
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[StepRecord, int], None] = lambda record, num_steps: None,
    snapshot: Callable[[], torch.Tensor] | None = None,
    snapshot_every: int = 1,
    frozen_tokens: ClassTokens | None = None,
) -> Generator[int, None, Trained]:
    """Trains `method` in place on the tasks' `sets` (same order), by SGD or AdamW, and yields at the end of each epoch
    its number, from 1, so that `method` can be looked at. A training that goes on from a checkpoint yields the epoch of
    that first. Parameters that require no gradient stay as they are.

    Args:
        method: gives, when called, the Adaptation of the same tasks.
        sets: with images for a method that changes the image tower's features, and with frozen features for one that
            does not, or is held to them.
        tokens: class tokens of the same tasks.
        checkpoints: for the whole state every config.checkpoint_every epochs, from which an interrupted
            training goes on.
        on_step: told each new step's record and the number of all steps.
        snapshot: reads something off the backward pass of every `snapshot_every`-th step, from the first.
        frozen_tokens: the classes' texts to the frozen CLIP, where `tokens` have other words.

    Returns:
        All steps' records, and the snapshots.

    Raises:
        UserError: a loss that is not finite, naming task and step; a checkpoint that cannot be written; out of memory.
    """
    device = towers.device
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = _optimizer(parameters, config)
    history: list[StepRecord] = []
    snapshots: list[Snapshot] = []
    if checkpoints and (state := checkpoints.load()):
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        history = [StepRecord(*values) for values in state["history"]]
        before = zip(state["snapshot_at"], state["snapshots"], state["points"])
        snapshots = [Snapshot(history[at], gradients, point) for at, gradients, point in before]

    per_epoch = num_steps_per_epoch((len(task.labels) for task in sets), config.batch_size)
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

    @cache
    def frozen_texts() -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), autocast(device, precision):
            z = towers.encode_text(frozen_tokens or tokens)
        return tokens.pool_names_to_classes(z)

    if history and len(history) % per_epoch == 0:
        yield len(history) // per_epoch
    for step in range(len(history), num_steps):
        epoch = step // per_epoch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, epochs, config)
        with memory:
            with autocast(device, precision):
                adaptation = method()
                if adaptation.consistency or not adaptation.changes_images:
                    frozen, labels = zip(
                        *(task.frozen_batch(step, config.batch_size, seed, part) for task, part in zip(sets, parts))
                    )
                if adaptation.changes_images:
                    pixels, labels = zip(
                        *(
                            task.batch(step, config.batch_size, towers.image_size, config.augmentation, seed, part)
                            for task, part in zip(sets, parts)
                        )
                    )
                    images = towers.normalize_pixels(torch.cat(pixels))
                    x: Sequence[torch.Tensor] = adaptation.encode_image(towers, images, images_per_task).split(
                        images_per_task
                    )
                else:
                    x = [adaptation.adapt(features) for features in frozen]
                if adaptation.changes_texts:
                    rows = share.all_rows(adaptation.encode_text(towers, own_tokens), len(tokens.suffix))
                    z = tokens.pool_names_to_classes(rows)
                else:
                    z = frozen_texts()
            logits = [adaptation.logits(towers, *features) for features in zip(x, z)]
            losses = torch.stack([F.cross_entropy(*pair, reduction="sum") for pair in zip(logits, labels)])
            losses = losses / config.batch_size
            if adaptation.consistency:
                losses = losses + torch.stack(
                    [
                        _consistency(
                            adaptation.consistency, towers, *of_task, config.batch_size, len(sets), share.world
                        )
                        for of_task in zip(x, frozen, z, frozen_texts(), logits)
                    ]
                )
            optimizer.zero_grad()
            losses.sum().backward()
        hits = torch.stack([(of_task.argmax(1) == label).sum() for of_task, label in zip(logits, labels)])
        measured = torch.stack([losses.detach(), hits / config.batch_size])
        taken = snapshot() if snapshot and step % snapshot_every == 0 else measured.new_empty(0)
        # A step depends on all parameters, so that each has a gradient.
        share.add_up([*(cast(torch.Tensor, parameter.grad) for parameter in parameters), measured, taken])

        record = StepRecord(step + 1, epoch + 1, optimizer.param_groups[0]["lr"], *map(tuple, measured.tolist()))
        for task, loss in zip(sets, record.losses):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of task {task.task!r} is {loss} at step {record.step}: lower the learning_rate "
                    f"{config.learning_rate:g} (of the section training, or the method's own) or set "
                    "clip.precision=float32"
                )
        history.append(record)
        if len(taken):
            point = parameters_to_vector(parameters).detach()
            snapshots.append(Snapshot(record, taken.float().cpu(), point.float().cpu()))
        optimizer.step()

        if share.first:
            if checkpoints and (step + 1) % (per_epoch * config.checkpoint_every) == 0 and step + 1 < num_steps:
                checkpoints.save(
                    {
                        "method": method.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "history": [tuple(vars(past).values()) for past in history],
                        "snapshot_at": [past.record.step - 1 for past in snapshots],
                        "snapshots": [past.gradients for past in snapshots],
                        "points": [past.point for past in snapshots],
                    }
                )
            on_step(record, num_steps)
        if (step + 1) % per_epoch == 0:
            yield epoch + 1
    return history, snapshots


def _optimizer(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=config.momentum, weight_decay=decay)


def _consistency(
    consistency: Consistency,
    towers: ClipTowers,
    x: torch.Tensor,
    frozen_x: torch.Tensor,
    z: torch.Tensor,
    frozen_z: torch.Tensor,
    logits: torch.Tensor,
    batch_size: int,
    num_tasks: int,
    num_workers: int,
) -> torch.Tensor:
    """Of one task: this worker's part of the mean over images, and its share of what all workers have alike."""
    frozen_logits = towers.logits(frozen_x, frozen_z)
    x, frozen_x, z, frozen_z = (F.normalize(rows.to(logits.dtype), dim=-1) for rows in (x, frozen_x, z, frozen_z))
    alike = consistency.of_texts(z, frozen_z).mean()
    if consistency.of_parameters is not None:
        alike = alike + consistency.of_parameters / num_tasks
    return consistency.of_images(x, frozen_x, logits, frozen_logits).sum() / batch_size + alike / num_workers
