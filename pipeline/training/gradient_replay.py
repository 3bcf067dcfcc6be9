"""Gradients of a new task at the parameters that the global prompt had in its snapshots.

In the global prompt's training, each task's gradients depend only on its own batches and on the prompt's parameters, so
those of a new task can be computed afterwards, without the other tasks' images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn.utils import vector_to_parameters

from pipeline.clip.class_tokens import ClassTokens
from pipeline.clip.towers import ClipTowers
from pipeline.config import TrainingConfig
from pipeline.methods.mmap import SharedMmap
from pipeline.training.batches import TrainingSet
from pipeline.training.trainer import Snapshot, Trainer


def replay_gradients(
    towers: ClipTowers,
    method: SharedMmap,
    training_set: TrainingSet,
    tokens: ClassTokens,
    trajectory: Iterable[tuple[int, int, torch.Tensor]],
    config: TrainingConfig,
    seed: int,
    precision: str = "auto",
    on_snapshot: Callable[[int], None] = lambda num_done: None,
) -> list[Snapshot]:
    """Compute a task's gradient at each of the global prompt's snapshots (Eq. 8), without contributing to the update.

    Args:
        method: global prompt for this task alone; its parameters are overwritten.
        tokens: class tokens of this task.
        trajectory: (step, epoch, parameters (P,)) of each snapshot, as of `read_trajectory`.
        config: only batch size and augmentation are used.
        on_snapshot: called with the number of snapshots done.

    Returns:
        Snapshots with gradients (1, P).

    Raises:
        UserError: out of memory.
    """
    trainer = Trainer(towers, method, [training_set], tokens, config, epochs=1, seed=seed, precision=precision)
    snapshots = []
    for step, epoch, parameters in trajectory:
        vector_to_parameters(parameters.to(trainer.parameters[0]), trainer.parameters)
        record = trainer.record(step - 1, epoch - 1, 0.0, trainer.backward(step - 1))
        snapshots.append(Snapshot(record, method.task_gradients().cpu(), parameters))
        on_snapshot(len(snapshots))
    return snapshots
