"""Gradients of a task that comes after the global prompt was trained, taken at the prompt's values of then.

In that training each task's gradients depend on its own batches and on the prompt's values alone, so a task that was
not there can be asked afterwards what it would have wanted, without the other tasks' images.
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
from pipeline.training.trainer import Snapshot, StepRecord, Trainer


def replay_gradients(
    towers: ClipTowers,
    prompts: SharedMmap,
    of_task: TrainingSet,
    tokens: ClassTokens,
    points: Iterable[tuple[int, int, torch.Tensor]],
    config: TrainingConfig,
    seed: int,
    precision: str = "auto",
    on_point: Callable[[int], None] = lambda done: None,
) -> list[Snapshot]:
    """What the task's gradient would have been in each of the global prompt's snapshots (Eq. 8), had it trained along
    with no say in the update.

    Args:
        prompts: of this task alone; its values are lost.
        tokens: class tokens of this task.
        points: (step, epoch, values (P,)) of each snapshot, as of `read_trajectory`.
        config: the step's batch size and augmentation are used.
        on_point: told how many are done.

    Returns:
        Snapshots with gradients (1, P).

    Raises:
        UserError: out of memory.
    """
    trainer = Trainer(towers, prompts, [of_task], tokens, config, epochs=1, seed=seed, precision=precision)
    snapshots = []
    for step, epoch, point in points:
        vector_to_parameters(point.to(trainer.parameters[0]), trainer.parameters)
        losses, accuracies = trainer.backward(step - 1).tolist()
        record = StepRecord(step, epoch, 0.0, tuple(losses), tuple(accuracies))
        snapshots.append(Snapshot(record, prompts.task_gradients().cpu(), point))
        on_point(len(snapshots))
    return snapshots
