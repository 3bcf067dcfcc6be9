"""Gradients of a task that comes after the global prompt was trained, taken at the prompt's values of then.

In that training each task's gradients depend on its own batches and on the prompt's values alone, so a task that was
not there can be asked afterwards what it would have wanted, without the other tasks' images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch.nn.utils import vector_to_parameters

from pipeline.clip.class_tokens import ClassTokens
from pipeline.clip.precision import autocast
from pipeline.clip.towers import ClipTowers
from pipeline.config import TrainingConfig
from pipeline.methods.mmap import SharedMmap
from pipeline.training.batches import TrainingSet
from pipeline.training.loop import Snapshot, StepRecord
from pipeline.training.memory import out_of_memory_explained


def gradients_at_points(
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
        points: (step, epoch, values (P,)) of each snapshot, as of `read_points`.
        config: the step's batch size and augmentation are used.
        on_point: told how many are done.

    Returns:
        Snapshots with gradients (1, P).

    Raises:
        UserError: out of memory.
    """
    device = towers.device
    memory = out_of_memory_explained(device, "the measurement of a task's gradients: lower clip.activations_gib")
    parameters = list(prompts.parameters())
    snapshots = []
    for step, epoch, point in points:
        vector_to_parameters(point.to(parameters[0]), parameters)
        pixels, labels = of_task.batch(step - 1, config.batch_size, towers.image_size, config.augmentation, seed)
        with memory:
            with autocast(device, precision):
                adaptation = prompts()
                images = towers.normalize_pixels(pixels)
                x = adaptation.encode_image(towers, images, [len(images)])
                (z,) = tokens.pool_names_to_classes(adaptation.encode_text(towers, tokens))
                logits = adaptation.logits(towers, x, z)
            loss = F.cross_entropy(logits, labels)
            prompts.zero_grad()
            loss.backward()
        hits = (logits.argmax(1) == labels).double().mean()
        record = StepRecord(step, epoch, 0.0, (loss.item(),), (hits.item(),))
        snapshots.append(Snapshot(record, prompts.task_gradients().cpu(), point))
        on_point(len(snapshots))
    return snapshots
