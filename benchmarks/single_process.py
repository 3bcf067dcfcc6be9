"""The pipeline's computation in one process, without Ray and MLflow, one training after another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.load import load_clip
from pipeline.config import Config
from pipeline.data.index import index_dataset
from pipeline.data.parquet import SplitDescription, SplitReader, plan_parts, scan_image, write_part
from pipeline.data.splits import content_fingerprint, sample_splits
from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.partition import best_partition
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.classifier import Classifier
from pipeline.methods.mmap import GroupMmap, MmapShape, SharedMmap
from pipeline.training.batches import load_training_sets
from pipeline.training.evaluate import accuracy, evaluate
from pipeline.training.trainer import Trainer

STAGES = ("splits", "CLIP", "global prompt", "grouping", "group trainings", "evaluation")


def run_in_one_process(
    config: Config,
    root: Path,
    folder: Path,
    device: str = "cpu",
    threads: int = 1,
    stage: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
) -> dict[str, dict[str, float]]:
    """Run the computation of all stages, as in the paper, and return method → task → accuracy.

    Args:
        root: folder of the images.
        folder: where the splits are written.
        threads: threads that decode images.
        stage: its contexts are entered for the work of each of STAGES, in order.
    """
    with stage("splits"):
        reader, description = write_splits(config, root, folder)
    tasks = list(description.classes)
    with stage("CLIP"):
        towers = load_clip(config.clip, config.mmap.text_prompt_position, device)
    shape = MmapShape.of(config.mmap, towers)
    class_names = {task: description.class_names_for(task) for task in tasks}

    def tokens_for(group: list[str] | tuple[str, ...]) -> Any:
        return class_tokens(towers.tokenizer, config.clip.template, [class_names[task] for task in group])

    def train(prompts: Any, epochs: int, **options: Any) -> Trainer:
        prompts.to(towers.device)
        random_crop = config.training.augmentation.random_crop
        sets = load_training_sets(reader, prompts.tasks, towers.preprocessing, random_crop, towers.device, threads)
        tokens = tokens_for(prompts.tasks).to(towers.device)
        options |= {"epochs": epochs, "seed": config.seed, "precision": config.clip.precision}
        trainer = Trainer(towers, prompts, sets, tokens, config.training, **options)
        trainer.train()
        return trainer

    @torch.no_grad()
    def test_accuracy(group: list[str], adaptation: Adaptation) -> dict[str, float]:
        classifier = Classifier(towers, [(group, tokens_for(group), adaptation)], config.clip.precision)
        return accuracy(evaluate(classifier, reader, group, threads))

    with stage("global prompt"):
        shared = SharedMmap(shape, tasks, config.seed, config.mmap.init_std)
        epochs = config.global_prompt.epochs or config.training.epochs
        snapshots = train(shared, epochs, snapshot_every=1).snapshots
    with stage("grouping"):
        gradients = torch.stack([taken.gradients for taken in snapshots]).double().numpy()
        affinity = affinity_matrix(gradients, config.grouping.gradient_similarity)
        partition = best_partition(affinity, objective=config.grouping.objective)
    groups = [[tasks[i] for i in group] for group in partition.groups]
    trained: list[tuple[str, list[str], GroupMmap]] = []
    with stage("group trainings"):
        for method, group in [("all_in_one", tasks), *(("grouped", group) for group in groups)]:
            prompts = GroupMmap(shape, group, config.seed, config.mmap.init_std)
            train(prompts, config.training.epochs)
            trained.append((method, group, prompts))
    with stage("evaluation"), torch.no_grad():
        accuracies = {"zero_shot": test_accuracy(tasks, Adaptation()), "all_in_one": {}, "grouped": {}}
        for method, group, prompts in trained:
            accuracies[method] |= test_accuracy(group, prompts())
    return accuracies


def write_splits(config: Config, root: Path, folder: Path) -> tuple[SplitReader, SplitDescription]:
    dataset = index_dataset(config.data, root)
    scanned = [scan_image(dataset.root, image.path, image.task, image.class_folder) for image in dataset.images]
    splits = sample_splits(scanned, dataset.classes, config.data.shots, config.seed)
    counts = {
        name: {task: sum(image.task == task for image in split) for task in dataset.classes}
        for name, split in (("train", splits.train), ("test", splits.test))
    }
    classes = {task: list(names) for task, names in dataset.classes.items()}
    fingerprint = content_fingerprint(scanned)
    description = SplitDescription(classes, dataset.class_names, config.data.shots, config.seed, fingerprint, counts)
    sizes = {image.path: image.size for image in dataset.images}
    for part in plan_parts(splits.train, "train", sizes) + plan_parts(splits.test, "test", sizes):
        write_part(dataset.root, part, description, folder)
    (folder / "splits.json").write_text(description.to_json())
    return SplitReader(folder), description
