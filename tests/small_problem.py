"""A small two-task training problem and small test sets, for tests, the same in every process."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_clip import CLASS_NAMES, small_towers

from pipeline.clip.class_tokens import class_tokens
from pipeline.config import AugmentationConfig, MmapConfig, TrainingConfig
from pipeline.data.parquet import SplitDescription, plan_parts, scan_image, write_part
from pipeline.methods.classifier import Classifier
from pipeline.methods.mmap import GroupMmap, MmapShape
from pipeline.training.batches import TrainingSet

TASKS = ("ink", "chalk")
TEMPLATE = "a photo of a {}."
CONFIG = TrainingConfig(
    epochs=4,
    batch_size=3,
    learning_rate=0.05,
    warmup_epochs=1,
    warmup_learning_rate=1e-3,
    augmentation=AugmentationConfig(crop_scale=(0.5, 1.0)),
)


def small_problem():
    """Towers and open_clip's model in float64, class tokens, training sets of 10 and 5 images."""
    towers, model = small_towers()
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_NAMES, CLASS_NAMES])
    generator = torch.Generator().manual_seed(0)
    sets = [
        TrainingSet(
            (task,),
            tuple(torch.randint(0, 256, (3, 20, 18), generator=generator, dtype=torch.uint8) for _ in range(count)),
            (torch.arange(count) % len(CLASS_NAMES),),
        )
        for task, count in zip(TASKS, (10, 5))
    ]
    return towers, model, tokens, sets


def mmap_shape(towers) -> MmapShape:
    return MmapShape.of(MmapConfig(prompt_length=2, source_rows=2), towers)


def group_prompts(towers) -> GroupMmap:
    return GroupMmap(mmap_shape(towers), TASKS, seed=1, init_std=0.3).double()


TEST_COUNTS = {"chalk": 23, "ink": 3, "neon": 8}
NUM_CLASSES = len(CLASS_NAMES)


def write_test_splits(folder: Path) -> None:
    """<folder>/splits: test images of three tasks."""
    rng = np.random.default_rng(0)
    images, sizes = [], {}
    for task, count in TEST_COUNTS.items():
        for number in range(count):
            path = f"{task}/{number % NUM_CLASSES}/{number}.png"
            file = folder / "data" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
            images.append(scan_image(folder / "data", path, *path.split("/")[:2]))
            sizes[path] = file.stat().st_size
    names = [str(label) for label in range(NUM_CLASSES)]
    classes = {task: names for task in TEST_COUNTS}
    counts = {"train": dict.fromkeys(TEST_COUNTS, 0), "test": TEST_COUNTS}
    description = SplitDescription(classes, dict(zip(names, CLASS_NAMES)), 1, 1, "", counts)
    for part in plan_parts(images, "test", sizes):
        write_part(folder / "data", part, description, folder / "splits")
    (folder / "splits" / "splits.json").write_text(json.dumps(asdict(description)))


def prompted_classifier(device: str = "cpu") -> Classifier:
    """Build a classifier of the three tasks, with prompts."""
    towers, _ = small_towers()
    prompts = GroupMmap(mmap_shape(towers), tuple(TEST_COUNTS), seed=1, init_std=0.3).double()
    with torch.no_grad():
        adaptation = prompts.to(device)()
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_NAMES] * len(TEST_COUNTS))
    return Classifier(towers.to(device), [(TEST_COUNTS, tokens, adaptation)], "float32")
