"""The trainer of all methods: trains one method for one task or several on frozen towers.

A step takes a batch of each training set, and its loss is the sum of the batches' means: with a set per task, of the
tasks' mean cross-entropies (Eq. 11); with one set of all tasks, the mean over a mixed batch, each image against its own
task's classes. Where images may have several labels, their losses are those of multi_label.py. A step runs one image
forward for all batches and one text forward for all tasks' classes. Features that a method does not modify are not
computed in the step: text features are computed once, image features come with the training sets. A method may divide
its training into stages, each with its own parameters and learning rate schedule. Everything random is a function of
seed and step, so a resumed training gives identical results. In a process group, each worker takes its shard of every
step's images and classes, and only the main process reports and writes.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from itertools import accumulate
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
from pipeline.methods.method import FittedMethod, Method
from pipeline.training.aggregation import make_aggregation
from pipeline.training.batches import TrainingSet
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.distributed import DistributedShard
from pipeline.training.memory import explain_out_of_memory
from pipeline.training.multi_label import num_hits, summed_loss
from pipeline.training.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class StepRecord:
    """Metrics of a step; per task, in the order of the training sets. None: the step had no image of the task."""

    step: int
    """From 1."""
    epoch: int
    """From 1."""
    learning_rate: float
    losses: tuple[float | None, ...]
    """Mean over the task's images of the step."""
    accuracies: tuple[float | None, ...]
    """Fraction of the task's images of the step whose most probable class is their label, or one of their labels."""
    weights: tuple[float, ...] | None = None
    """Weights of the tasks in the update of what they share; None: equal (training.aggregation=sum)."""


def num_steps_per_epoch(set_sizes: Iterable[int], batch_size: int) -> int:
    """Return the number of steps in which the largest training set is seen completely."""
    return math.ceil(max(set_sizes) / batch_size)


def learning_rate(step: int, steps_per_epoch: int, epochs: float, config: TrainingConfig) -> float:
    """Return the learning rate of a step (from 0), as Dassl: constant warm-up, then a cosine of period `epochs`."""
    epoch = step // steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.warmup_learning_rate
    time = step / steps_per_epoch if config.schedule_interval == "step" else epoch
    cosine = (1 + math.cos(math.pi * (time - config.warmup_epochs) / epochs)) / 2
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


@dataclass(frozen=True)
class Snapshot:
    """The tasks' gradients in a step."""

    record: StepRecord
    gradients: torch.Tensor
    """(T, P), float32."""
    parameters: torch.Tensor
    """(P,), float32: the method's parameters at which the gradients were taken, in their order."""


@dataclass(eq=False)
class Trainer:
    """Trainer of `method`, in place, on `training_sets`; resumes from the newest checkpoint, if any.

    Fits a FittedMethod before the first step. Steps do not modify parameters that require no gradient. With several
    tasks, `config.aggregation` weighs them.
    """

    towers: ClipTowers
    method: nn.Module
    """Module whose forward pass returns the Adaptation of the same tasks."""
    training_sets: Sequence[TrainingSet]
    """Sets of which a step takes a batch each; together they have the same tasks, in order. With images for a method
    that modifies the image encoder, with frozen features for one that does not, or that is regularized towards them."""
    tokens: ClassTokens
    """Class tokens of the same tasks."""
    config: TrainingConfig
    _: KW_ONLY
    epochs: int
    seed: int
    precision: str = "auto"
    checkpoints: Checkpoints | None = None
    """Where to save the state every config.checkpoint_every epochs."""
    on_step: Callable[[StepRecord, int], None] = lambda record, num_steps: None
    """Called with each step's record and the total number of steps."""
    snapshot_every: int | None = None
    """Steps between snapshots of the tasks' gradients; None: no snapshots."""
    frozen_tokens: ClassTokens | None = None
    """Class tokens for the frozen CLIP, if they differ from `tokens`."""
    logit_biases: Mapping[str, float] = field(default_factory=dict)
    """Task → what is added to its logits, of multi-label tasks."""

    def __post_init__(self) -> None:
        towers, config = self.towers, self.config
        self._memory = explain_out_of_memory(
            towers.device,
            f"training: lower clip.activation_memory_gib={towers.activation_memory_gib:g} or training.batch_size="
            f"{config.batch_size}, or run fewer trainings at a time with a larger cluster.gpus_per_worker, or on CPUs "
            "cluster.cpus_per_worker",
        )
        if isinstance(self.method, FittedMethod):
            self._fit(self.method)
        self.parameters = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        self.tasks = [task for training_set in self.training_sets for task in training_set.tasks]
        self.aggregation = make_aggregation(config.aggregation, cast(Method, self.method), len(self.tasks), self.seed)
        """None: the sum."""
        self.history: list[StepRecord] = []
        """Records of all completed steps."""
        self.snapshots: list[Snapshot] = []
        self._epoch_weights = self.method.epoch_weights(self.epochs) if isinstance(self.method, Method) else None
        self._average = [torch.zeros_like(parameter) for parameter in self.parameters if self._epoch_weights]
        self.steps_per_epoch = num_steps_per_epoch(map(len, self.training_sets), config.batch_size)
        self.num_steps = self.epochs * self.steps_per_epoch
        num_steps = self.num_steps
        stage_steps = self.method.stage_steps(num_steps) if isinstance(self.method, Method) else (num_steps,)
        self._stage_bounds = list(accumulate(stage_steps, initial=0))
        self._shard = DistributedShard.current()
        slices = self._shard.shard_slices([config.batch_size] * len(self.training_sets))
        self._shards = list(zip(self.training_sets, slices))
        self._local_tokens = self.tokens.slice_rows(*self._shard.row_range(len(self.tokens.suffix)))
        if self.checkpoints and (state := self.checkpoints.load()):
            self.load_state_dict(state)
        self.num_saved_steps = len(self.history)
        """Number of steps of the newest checkpoint."""

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Optimizer of the parameters and the aggregation's, which torch does not build for none."""
        learned = self.aggregation.parameters() if self.aggregation else ()
        return OPTIMIZERS[self.config.optimizer]([*self.parameters, *learned], self.config)

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return len(self.history) // self.steps_per_epoch

    def train(self) -> list[StepRecord]:
        """Train to the end, and return the records of all steps. Raises: UserError: as `run_epoch`."""
        while self.epoch < self.epochs:
            self.run_epoch()
        return self.history

    def run_epoch(self) -> None:
        """Train to the end of the current epoch, and save a checkpoint if one is due.

        Raises:
            UserError: as `step`; a checkpoint cannot be written.
        """
        epoch = self.epoch + 1
        while self.epoch < epoch:
            record = self.step()
            if self._shard.is_main_process:
                is_due = self.epoch == epoch < self.epochs and epoch % self.config.checkpoint_every == 0
                if self.checkpoints and is_due:
                    self.checkpoints.save(self.state_dict())
                    self.num_saved_steps = len(self.history)
                self.on_step(record, self.num_steps)

    def step(self) -> StepRecord:
        """Update the parameters once, with a batch of each training set.

        Raises:
            UserError: a task's loss is not finite; no weights of the tasks are found; out of memory.
        """
        step, epoch = len(self.history), self.epoch
        stage = bisect(self._stage_bounds, step, hi=len(self._stage_bounds) - 1) - 1
        start, stop = self._stage_bounds[stage : stage + 2]
        if stage and step == start:
            self._start_stage(stage)
        stage_epochs = (stop - start) / self.steps_per_epoch
        lr = learning_rate(step - start, self.steps_per_epoch, stage_epochs, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        metrics = self.backward(step)
        is_snapshot = self.snapshot_every is not None and step % self.snapshot_every == 0
        needs_gradients = is_snapshot or self.aggregation is not None
        gradients = cast(Method, self.method).task_gradients() if needs_gradients else metrics.new_empty(0)
        # On all workers the same parameters have a gradient: those of the stage, since a step depends on all of them.
        parameter_gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self._shard.all_reduce_sum([*parameter_gradients, metrics, gradients])
        self._check_finite(step, metrics)
        point = parameters_to_vector(self.parameters).detach() if is_snapshot else None
        weights = None
        if self.aggregation:
            weights = self.aggregation.update(self.optimizer, step, metrics[0], gradients)
        else:
            self.optimizer.step()
        record = self.record(step, epoch, lr, metrics, weights)
        if point is not None:
            self.snapshots.append(Snapshot(record, gradients.float().cpu(), point.float().cpu()))
        self.history.append(record)
        if self._epoch_weights and self.epoch > epoch:
            self._average_epoch(self._epoch_weights[epoch])
        return record

    @torch.no_grad()
    def _start_stage(self, stage: int) -> None:
        with self._memory, autocast(self.towers, self.precision):
            class_features = self._text_features(self.method())
        cast(Method, self.method).start_stage(stage, class_features)

    def backward(self, step: int) -> torch.Tensor:
        """Compute the gradients of a step (from 0), and return (3, T): this worker's part of what each task adds to the
        loss, of its images whose most probable class is right, and of its images.

        Raises:
            UserError: out of memory.
        """
        size = self.config.batch_size
        with self._memory:
            with autocast(self.towers, self.precision):
                adaptation = self.method()
                x, frozen_x, labels = self._image_features(adaptation, step)
                z = self._text_features(adaptation)
            logits = [adaptation.logits(self.towers, *pair, task) for task, pair in enumerate(zip(x, z))]
            logits = [
                scores + self.logit_biases[task] if task in self.logit_biases else scores
                for task, scores in zip(self.tasks, logits)
            ]
            losses = torch.stack([summed_loss(*pair) for pair in zip(logits, labels)]) / size
            if adaptation.consistency:
                losses = losses + self._consistency_losses(adaptation.consistency, x, frozen_x, z, logits)
            self.optimizer.zero_grad()
            losses.sum().backward()
        hits = torch.stack([num_hits(*pair) for pair in zip(logits, labels)])
        counts = losses.new_tensor([len(label) for label in labels])
        return torch.stack([losses.detach(), hits.to(losses.dtype), counts])

    def record(
        self, step: int, epoch: int, learning_rate: float, metrics: torch.Tensor, weights: torch.Tensor | None = None
    ) -> StepRecord:
        """Return the record of a step of an epoch (both from 0) from the workers' summed `backward` and the tasks'
        weights."""
        losses, hits, counts = metrics.tolist()
        return StepRecord(
            step + 1,
            epoch + 1,
            learning_rate,
            # The loss has the task's mean with the weight count / batch_size: 1 for a task with a set of its own.
            tuple(loss / (count / self.config.batch_size) if count else None for loss, count in zip(losses, counts)),
            tuple(hit / count if count else None for hit, count in zip(hits, counts)),
            None if weights is None else tuple(weights.tolist()),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a trainer with the same arguments resumes; as in torch, the next step changes its
        tensors."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "aggregation": self.aggregation.state_dict() if self.aggregation else {},
            "average": self._average,
            "history": [tuple(vars(record).values()) for record in self.history],
            "snapshot_steps": [snapshot.record.step - 1 for snapshot in self.snapshots],
            "snapshots": [snapshot.gradients for snapshot in self.snapshots],
            "points": [snapshot.parameters for snapshot in self.snapshots],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from another trainer's `state_dict`."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.aggregation:
            self.aggregation.load_state_dict(state["aggregation"])
        self._average = [average.to(self.towers.device, copy=True) for average in state["average"]]
        self.history = [StepRecord(*values) for values in state["history"]]
        snapshots = zip(state["snapshot_steps"], state["snapshots"], state["points"])
        self.snapshots = [Snapshot(self.history[step], *tensors) for step, *tensors in snapshots]

    @torch.no_grad()
    def _fit(self, method: FittedMethod) -> None:
        """Fit the method to the frozen features of the training images; every worker does so."""
        size = self.config.batch_size
        with self._memory:
            features = [
                task_features.double()
                for training_set in self.training_sets
                for task_features in training_set.frozen_views(method.views, size, self.seed)
            ]
            labels = [task_labels for training_set in self.training_sets for task_labels in training_set.labels]
            method.fit(features, labels, [z.double() for z in self._frozen_text_features])

    @torch.no_grad()
    def _average_epoch(self, weight: float) -> None:
        """Add the parameters to their average over epochs, with which a training ends."""
        for parameter, average in zip(self.parameters, self._average):
            average.add_(parameter, alpha=weight)
            if self.epoch == self.epochs:
                parameter.copy_(average)

    def _image_features(
        self, adaptation: Adaptation, step: int
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Return, for each task's images in a step: features, the frozen CLIP's if needed, labels."""
        size, towers, augmentation = self.config.batch_size, self.towers, self.config.augmentation
        frozen: Sequence[torch.Tensor] = ()
        if adaptation.consistency or not adaptation.modifies_image_encoder:
            frozen_x, labels, counts = _join(s.frozen_batch(step, size, self.seed, rows) for s, rows in self._shards)
            frozen = frozen_x.split(counts)
        if not adaptation.modifies_image_encoder:
            return adaptation.adapt_image_features(frozen_x).split(counts), frozen, labels
        pixels, labels, counts = _join(
            s.batch(step, size, towers.preprocessing, augmentation, self.seed, rows) for s, rows in self._shards
        )
        images = towers.normalize_pixels(pixels)
        return adaptation.encode_image(towers, images, counts).split(counts), frozen, labels

    def _text_features(self, adaptation: Adaptation) -> tuple[torch.Tensor, ...]:
        """Return the features (C, E) of each task's classes."""
        if not adaptation.modifies_text_encoder:
            return self._frozen_text_features
        local = adaptation.encode_text(self.towers, self._local_tokens)
        return self.tokens.pool_names_to_classes(self._shard.all_gather_rows(local, len(self.tokens.suffix)))

    @cached_property
    def _frozen_text_features(self) -> tuple[torch.Tensor, ...]:
        tokens = self.frozen_tokens or self.tokens
        with torch.no_grad(), autocast(self.towers, self.precision):
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
        """Return, per task, this worker's part of what is added to the loss: for each image its image loss and its
        task's text loss."""
        losses, size = [], self.config.batch_size
        for *features, scores in zip(x, frozen_x, z, self._frozen_text_features, logits):
            frozen_logits = self.towers.logits(features[1], features[3])
            unit_x, unit_frozen_x, unit_z, unit_frozen_z = (F.normalize(f.to(scores.dtype), dim=-1) for f in features)
            shared_loss = consistency.text_loss(unit_z, unit_frozen_z).mean()
            if consistency.parameter_loss is not None:
                shared_loss = shared_loss + consistency.parameter_loss / len(self.training_sets)
            image_loss = consistency.image_loss(unit_x, unit_frozen_x, scores, frozen_logits).sum()
            losses.append(image_loss / size + shared_loss * (len(scores) / size))
        return torch.stack(losses)

    def _check_finite(self, step: int, metrics: torch.Tensor) -> None:
        for task, loss in zip(self.tasks, metrics[0].tolist()):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of task {task!r} is {loss} at step {step + 1}: lower the learning_rate "
                    f"{self.config.learning_rate:g} (--training.learning_rate for MmAP; methods with their own have, "
                    "for example, --coop.training.learning_rate), or set --clip.precision float32"
                )


def _join(
    batches: Iterable[tuple[torch.Tensor, tuple[torch.Tensor, ...]]],
) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """Concatenate the sets' batches to images (or their features), each task's labels and number of images."""
    images, labels_of_sets = zip(*batches)
    labels = [task_labels for set_labels in labels_of_sets for task_labels in set_labels]
    return torch.cat(images), labels, [len(task_labels) for task_labels in labels]
