"""What the workers of stages 2 and 4 have in common: a picklable description of a training, and the way to its tensors.

An open_clip model is never sent to a worker: it gets names and paths and loads the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.train.torch
import torch
from torch import nn

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.load import load_clip
from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.data.parquet import SplitReader
from pipeline.methods.registry import kind_of, options_of
from pipeline.progress import Reporter
from pipeline.run import NUMBERS_VERSION, Run
from pipeline.storage import Artefact
from pipeline.training.batches import load_training_sets
from pipeline.training.loop import StepRecord, train
from pipeline.training.share import Share

log = logging.getLogger(__name__)
HISTORY = "history.parquet"


@dataclass(frozen=True)
class TrainingWork:
    """A training or evaluation of some tasks, as it is sent to a worker."""

    config: Config
    splits: Path
    tasks: tuple[str, ...]
    label: str
    method: str = "mmap"

    def device(self) -> torch.device:
        """The GPU that Ray gave this worker, or the CPU with as many threads as the training may use."""
        if Share.of_this_process().world > 1 and torch.cuda.is_available():
            return ray.train.torch.get_device()
        if ray.get_gpu_ids():
            if torch.cuda.is_available():
                return torch.device("cuda")
            log.warning(
                "Ray gave %r a GPU that torch %s cannot use; training on the CPU", self.label, torch.__version__
            )
        torch.set_num_threads(self.config.cluster.cpus_per_training)
        return torch.device("cpu")

    def towers(self, float32: bool = False) -> ClipTowers:
        return load_clip(self.config.clip, self.config.mmap.text_order, str(self.device()), float32)

    def reader(self) -> SplitReader:
        return SplitReader(self.splits)

    def words(self) -> dict[str, list[str]]:
        description = self.reader().description
        return {task: description.words(task) for task in self.tasks}

    def train(
        self,
        towers: ClipTowers,
        method: nn.Module,
        epochs: int,
        artefact: Artefact,
        reporter: Reporter,
        **snapshots: Any,
    ) -> list[tuple[StepRecord, torch.Tensor]]:
        """Trains `method` on the tasks, from the artefact's checkpoint if there is one, and writes history.parquet;
        takes and returns the loop's snapshots."""
        config, rows_of_tasks = self.config, list(self.words().values())
        history, taken = train(
            towers,
            method,
            load_training_sets(
                self.reader(), self.tasks, towers.image_size, towers.device, config.cluster.cpus_per_training
            ),
            class_tokens(towers.tokenizer, kind_of(self.method).template(config), rows_of_tasks).to(towers.device),
            config.training,
            epochs=epochs,
            seed=config.seed,
            precision=config.clip.precision,
            checkpoints=artefact.checkpoints,
            on_step=lambda record, num_steps: reporter.update(
                record.step, num_steps, "steps", (record.step, step_metrics(self.tasks, record))
            ),
            **snapshots,
        )
        if Share.of_this_process().first:
            write_history(artefact.building / HISTORY, self.tasks, history)
        return taken


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


def trainings_decided_by(run: Run, tasks: Sequence[str], epochs: int, method: str = "mmap") -> dict[str, Any]:
    return {
        **numbers_decided_by(run, tasks),
        "method": method,
        **options_of(method, run.config),
        "training": run.config.training.model_dump(mode="json", exclude={"checkpoint_every"}) | {"epochs": epochs},
    }


def step_metrics(tasks: Sequence[str], record: StepRecord) -> dict[str, float]:
    """A step as MLflow metrics."""
    metrics = {"learning_rate": record.learning_rate}
    for task, loss, accuracy in zip(tasks, record.losses, record.accuracies):
        metrics |= {f"train_loss/{task}": loss, f"train_accuracy/{task}": accuracy}
    return metrics


def track_history(run: Run, name: str, artefact: Artefact) -> None:
    """Gives MLflow run `name` all steps of a finished training. Those that were reported while it went on are known
    to the tracker; this adds what died with a driver or worker, and trainings that another run made."""
    columns = pq.read_table(artefact.folder / HISTORY).to_pydict()
    by_step: dict[int, dict[str, float]] = {}
    for step, task, loss, accuracy, rate in zip(
        *(columns[name] for name in ("step", "task", "loss", "accuracy", "learning_rate"))
    ):
        record = StepRecord(step, 0, rate, (loss,), (accuracy,))
        by_step.setdefault(step, {}).update(step_metrics([task], record))
    for step, metrics in by_step.items():
        run.tracker.log_metrics(name, metrics, step)


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
