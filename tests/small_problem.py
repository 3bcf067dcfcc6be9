"""A small two-task training problem for tests, the same in every process."""

from __future__ import annotations

import torch
from small_clip import CLASS_WORDS, small_towers

from pipeline.clip.class_tokens import class_tokens
from pipeline.config import AugmentationConfig, MmapConfig, TrainingConfig
from pipeline.methods.mmap import GroupMmap, MmapShape
from pipeline.training.batches import TrainingSet

TASKS = ("ink", "chalk")
TEMPLATE = "a photo of a {}."
CONFIG = TrainingConfig(
    epochs=4,
    batch_size=3,
    learning_rate=0.05,
    warmup_epochs=1,
    warmup_rate=1e-3,
    augmentation=AugmentationConfig(crop_scale=(0.5, 1.0)),
)


def small_problem():
    """Towers and open_clip's model in float64, class tokens, training sets of 10 and 5 images."""
    towers, model = small_towers()
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_WORDS, CLASS_WORDS])
    generator = torch.Generator().manual_seed(0)
    sets = [
        TrainingSet(
            task,
            tuple(torch.randint(0, 256, (3, 20, 18), generator=generator, dtype=torch.uint8) for _ in range(count)),
            torch.arange(count) % len(CLASS_WORDS),
        )
        for task, count in zip(TASKS, (10, 5))
    ]
    return towers, model, tokens, sets


def mmap_shape(towers) -> MmapShape:
    return MmapShape.of(MmapConfig(prompt_length=2, source_rows=2), towers)


def group_prompts(towers) -> GroupMmap:
    return GroupMmap(mmap_shape(towers), TASKS, seed=1, init_std=0.3).double()
