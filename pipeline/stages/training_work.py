"""What the workers of stages 2 and 4 have in common: a picklable description of a training, and the way to its tensors.

An open_clip model is never sent to a worker: it gets names and paths and loads the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from pipeline.clip.class_tokens import ClassTokens, class_tokens
from pipeline.clip.load import load_clip
from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.data.parquet import SplitReader
from pipeline.progress import Reporter
from pipeline.run import NUMBERS_VERSION, Run
from pipeline.training.batches import TrainingSet, load_training_sets
from pipeline.training.loop import StepRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingWork:
    """A training or evaluation of some tasks, as it is sent to a worker."""

    config: Config
    splits: Path
    tasks: tuple[str, ...]
    label: str

    def device(self) -> torch.device:
        """The GPU that Ray gave this worker, or the CPU with as many threads as the training may use."""
        if ray.get_gpu_ids():
            if torch.cuda.is_available():
                return torch.device("cuda")
            log.warning(
                "Ray gave %r a GPU that torch %s cannot use; training on the CPU", self.label, torch.__version__
            )
        torch.set_num_threads(self.config.cluster.cpus_per_training)
        return torch.device("cpu")

    def towers(self) -> ClipTowers:
        return load_clip(self.config.clip, self.config.mmap.text_order, str(self.device()))

    def reader(self) -> SplitReader:
        return SplitReader(self.splits)

    def words(self) -> dict[str, list[str]]:
        description = self.reader().description
        return {task: description.words(task) for task in self.tasks}

    def training_sets(self, towers: ClipTowers) -> list[TrainingSet]:
        threads = self.config.cluster.cpus_per_training
        return load_training_sets(self.reader(), self.tasks, towers.image_size, towers.device, threads)

    def tokens(self, towers: ClipTowers) -> ClassTokens:
        return class_tokens(towers.tokenizer, self.config.clip.template, list(self.words().values())).to(towers.device)

    def step_reporter(self, reporter: Reporter) -> Callable[[StepRecord, int], None]:
        def report(record: StepRecord, num_steps: int) -> None:
            metrics = {"learning_rate": record.learning_rate}
            for task, loss, accuracy in zip(self.tasks, record.losses, record.accuracies):
                metrics |= {f"train_loss/{task}": loss, f"train_accuracy/{task}": accuracy}
            reporter.update(record.step, num_steps, "steps", (record.step, metrics))

        return report


def numbers_decided_by(run: Run, tasks: Sequence[str]) -> dict[str, Any]:
    """What every training's and evaluation's numbers depend on, for the name of its artefact."""
    return {
        "version": NUMBERS_VERSION,
        "splits": SplitReader(run.splits.folder).description.source_fingerprint,
        "shots": run.config.data.shots,
        "seed": run.config.seed,
        "clip": asdict(run.clip),
        "template": run.config.clip.template,
        "precision": run.config.clip.precision,
        "words": {task: [run.listing.class_words[name] for name in run.listing.classes[task]] for task in tasks},
    }


def trainings_decided_by(run: Run, tasks: Sequence[str], epochs: int) -> dict[str, Any]:
    return {
        **numbers_decided_by(run, tasks),
        "mmap": run.config.mmap.model_dump(mode="json"),
        "training": run.config.training.model_dump(mode="json", exclude={"checkpoint_every"}) | {"epochs": epochs},
    }


def write_history(path: Path, tasks: Sequence[str], history: Sequence[StepRecord]) -> None:
    """One row a (step, task): step, epoch, task, loss, accuracy on the batch, learning_rate."""
    rows = [
        {
            "step": record.step,
            "epoch": record.epoch,
            "task": task,
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": record.learning_rate,
        }
        for record in history
        for task, loss, accuracy in zip(tasks, record.losses, record.accuracies)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
