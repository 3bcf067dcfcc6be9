"""The trainer of all methods: one method for several tasks on frozen towers, all tasks in every step.

A step takes a batch of each task, runs one image forward for the mixed batch and one text forward for all tasks'
classes, and sums the tasks' mean cross-entropies (Eq. 11). What a method leaves as the frozen CLIP has it is not
computed in the step: text features are computed once, image features come with the training sets. Everything random is
a function of seed and step, so a training that is interrupted goes on from its state with the same numbers as without
the interruption. In a process group, each worker takes its share of every step's images and classes, and only the
first one reports and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
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
from pipeline.methods.adaptation import Adaptation, Consistency
from pipeline.training.batches import TrainingSet
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.distributed import DistributedShard
from pipeline.training.memory import explain_out_of_memory


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
        return config.warmup_learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * (epoch - config.warmup_epochs) / epochs)) / 2


@dataclass(frozen=True)
class Snapshot:
    """What the tasks' gradients were in a step."""

    record: StepRecord
    gradients: torch.Tensor
    """(T, P), float32."""
    parameters: torch.Tensor
    """(P,), float32: the method's parameters of which these are the gradients, in their order."""


OPTIMIZERS: Mapping[str, Callable[[Sequence[nn.Parameter], TrainingConfig], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, config: torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    ),
    "adamw": lambda parameters, config: torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    ),
}
"""By the names of `training.optimizer`."""


@dataclass(eq=False)
class Trainer:
    """Trains `method` in place on the tasks' `sets`, from the newest of the `checkpoints` if there is one.

    Parameters that require no gradient stay as they are.
    """

    towers: ClipTowers
    method: nn.Module
    """Gives, when called, the Adaptation of the same tasks."""
    sets: Sequence[TrainingSet]
    """With images for a method that changes the image tower's features, and with frozen features for one that does
    not, or is held to them."""
    tokens: ClassTokens
    """Class tokens of the same tasks."""
    config: TrainingConfig
    _: KW_ONLY
    epochs: int
    seed: int
    precision: str = "auto"
    checkpoints: Checkpoints | None = None
    """For the whole state every config.checkpoint_every epochs."""
    on_step: Callable[[StepRecord, int], None] = lambda record, num_steps: None
    """Told each new step's record and the number of all steps."""
    snapshot_fn: Callable[[], torch.Tensor] | None = None
    """Reads something off the backward pass of every `snapshot_every`-th step, from the first."""
    snapshot_every: int = 1
    frozen_tokens: ClassTokens | None = None
    """The classes' texts to the frozen CLIP, where `tokens` have other words."""

    def __post_init__(self) -> None:
        towers, config = self.towers, self.config
        self.parameters = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        self.optimizer = OPTIMIZERS[config.optimizer](self.parameters, config)
        self.history: list[StepRecord] = []
        """Of all steps that are done."""
        self.snapshots: list[Snapshot] = []
        self.steps_per_epoch = num_steps_per_epoch((len(task.labels) for task in self.sets), config.batch_size)
        self.num_steps = self.epochs * self.steps_per_epoch
        self._share = DistributedShard.current()
        self._own_sets = list(zip(self.sets, self._share.shard_slices([config.batch_size] * len(self.sets))))
        self._own_tokens = self.tokens.slice_rows(*self._share.row_range(len(self.tokens.suffix)))
        self._memory = explain_out_of_memory(
            towers.device,
            f"training: lower clip.activation_memory_gib={towers.activation_memory_gib:g} or training.batch_size="
            f"{config.batch_size}, or train fewer at once (a larger cluster.gpus_per_worker, or on CPUs "
            "cluster.cpus_per_worker)",
        )
        if self.checkpoints and (state := self.checkpoints.load()):
            self.load_state_dict(state)

    @property
    def epoch(self) -> int:
        """Number of epochs that are done."""
        return len(self.history) // self.steps_per_epoch

    def train(self) -> list[StepRecord]:
        """Trains to the end; the records of all steps. Raises: UserError: as `run_epoch`."""
        while self.epoch < self.epochs:
            self.run_epoch()
        return self.history

    def run_epoch(self) -> None:
        """Trains to the end of the epoch that is begun, or of the next one, and saves a checkpoint if one is due.

        Raises:
            UserError: as `step`; a checkpoint that cannot be written.
        """
        epoch = self.epoch + 1
        while self.epoch < epoch:
            record = self.step()
            if self._share.is_main_process:
                due = self.epoch == epoch < self.epochs and epoch % self.config.checkpoint_every == 0
                if self.checkpoints and due:
                    self.checkpoints.save(self.state_dict())
                self.on_step(record, self.num_steps)

    def step(self) -> StepRecord:
        """Updates the parameters once, by a batch of each task.

        Raises:
            UserError: a loss that is not finite, naming task and step; out of memory.
        """
        step, epoch = len(self.history), self.epoch
        rate = learning_rate(epoch, self.epochs, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        measured = self.backward(step)
        taken = self.snapshot_fn() if self.snapshot_fn and step % self.snapshot_every == 0 else measured.new_empty(0)
        # A step depends on all parameters, so that each has a gradient.
        self._share.all_reduce_sum(
            [*(cast(torch.Tensor, parameter.grad) for parameter in self.parameters), measured, taken]
        )
        record = StepRecord(step + 1, epoch + 1, rate, *map(tuple, measured.tolist()))
        self._check_finite(record)
        if len(taken):
            point = parameters_to_vector(self.parameters).detach()
            self.snapshots.append(Snapshot(record, taken.float().cpu(), point.float().cpu()))
        self.optimizer.step()
        self.history.append(record)
        return record

    def backward(self, step: int) -> torch.Tensor:
        """Gives the parameters the gradients of a step (from 0) at their present values; the tasks' losses and
        accuracies (2, T). Of a shared training, this worker's part of all these.

        Raises:
            UserError: out of memory.
        """
        size = self.config.batch_size
        with self._memory:
            with autocast(self.towers.device, self.precision):
                adaptation = self.method()
                x, frozen_x, labels = self._image_features(adaptation, step)
                z = self._text_features(adaptation)
            logits = [adaptation.logits(self.towers, *features) for features in zip(x, z)]
            losses = torch.stack([F.cross_entropy(*pair, reduction="sum") for pair in zip(logits, labels)]) / size
            if adaptation.consistency:
                losses = losses + self._consistency_losses(adaptation.consistency, x, frozen_x, z, logits)
            self.optimizer.zero_grad()
            losses.sum().backward()
        hits = torch.stack([(of_task.argmax(1) == label).sum() for of_task, label in zip(logits, labels)])
        return torch.stack([losses.detach(), hits / size])

    def state_dict(self) -> dict[str, Any]:
        """All that a new trainer of the same arguments needs to go on; as in torch, its tensors change with the next
        step."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": [tuple(vars(record).values()) for record in self.history],
            "snapshot_steps": [taken.record.step - 1 for taken in self.snapshots],
            "snapshots": [taken.gradients for taken in self.snapshots],
            "points": [taken.parameters for taken in self.snapshots],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another trainer's `state_dict` was taken."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [StepRecord(*values) for values in state["history"]]
        taken = zip(state["snapshot_steps"], state["snapshots"], state["points"])
        self.snapshots = [Snapshot(self.history[at], gradients, point) for at, gradients, point in taken]

    def _image_features(
        self, adaptation: Adaptation, step: int
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Of each task's images in a step: their features, those of the frozen CLIP if they are needed, labels."""
        size, towers = self.config.batch_size, self.towers
        frozen: Sequence[torch.Tensor] = ()
        if adaptation.consistency or not adaptation.modifies_image_encoder:
            frozen, labels = zip(*(task.frozen_batch(step, size, self.seed, part) for task, part in self._own_sets))
        if not adaptation.modifies_image_encoder:
            return [adaptation.adapt_image_features(features) for features in frozen], frozen, labels
        augmented = towers.image_size, self.config.augmentation, self.seed
        pixels, labels = zip(*(task.batch(step, size, *augmented, part) for task, part in self._own_sets))
        counts = [len(of_task) for of_task in pixels]
        images = towers.normalize_pixels(torch.cat(pixels))
        return adaptation.encode_image(towers, images, counts).split(counts), frozen, labels

    def _text_features(self, adaptation: Adaptation) -> tuple[torch.Tensor, ...]:
        """Of each task's classes (C, E)."""
        if not adaptation.modifies_text_encoder:
            return self._frozen_texts
        own = adaptation.encode_text(self.towers, self._own_tokens)
        return self.tokens.pool_names_to_classes(self._share.all_gather_rows(own, len(self.tokens.suffix)))

    @cached_property
    def _frozen_texts(self) -> tuple[torch.Tensor, ...]:
        tokens = self.frozen_tokens or self.tokens
        with torch.no_grad(), autocast(self.towers.device, self.precision):
            z = self.towers.encode_text(tokens)
        return self.tokens.pool_names_to_classes(z)

    def _consistency_losses(
        self,
        consistency: Consistency,
        x: Sequence[torch.Tensor],
        frozen_x: Sequence[torch.Tensor],
        z: Sequence[torch.Tensor],
        logits: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Of each task: this worker's part of the mean over images, and its share of what all workers have alike."""
        losses = []
        for *features, of_task in zip(x, frozen_x, z, self._frozen_texts, logits):
            frozen_logits = self.towers.logits(features[1], features[3])
            unit_x, unit_frozen_x, unit_z, unit_frozen_z = (F.normalize(f.to(of_task.dtype), dim=-1) for f in features)
            alike = consistency.text_loss(unit_z, unit_frozen_z).mean()
            if consistency.parameter_loss is not None:
                alike = alike + consistency.parameter_loss / len(self.sets)
            image_loss = consistency.image_loss(unit_x, unit_frozen_x, of_task, frozen_logits).sum()
            losses.append(image_loss / self.config.batch_size + alike / self._share.world_size)
        return torch.stack(losses)

    def _check_finite(self, record: StepRecord) -> None:
        for task, loss in zip(self.sets, record.losses):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of task {task.task!r} is {loss} at step {record.step}: lower the learning_rate "
                    f"{self.config.learning_rate:g} (of the section training, or the method's own) or set "
                    "clip.precision=float32"
                )
