"""Training spec: the picklable description of a training in stages 2, 3 and 5, from which a worker builds its tensors.

An open_clip model is never sent to a worker, which gets names and paths and loads the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import nn

from pipeline.clip.load import load_clip
from pipeline.clip.precision import autocast
from pipeline.clip.towers import ClipTowers
from pipeline.config import Config, Effect, values_affecting
from pipeline.data.parquet import SplitReader
from pipeline.files import read_parquet
from pipeline.methods.classifier import Classifier
from pipeline.methods.method import Method
from pipeline.methods.registry import get_method, training_config
from pipeline.runtime.progress import Reporter
from pipeline.runtime.session import Session
from pipeline.runtime.storage import Artifact, ArtifactWriter, Storage
from pipeline.stages.plan import RESULTS_VERSION, Plan
from pipeline.training.batches import TrainingSet, load_training_labels, load_training_sets
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.distributed import DistributedShard
from pipeline.training.evaluate import AnyPrediction, evaluate, evaluate_features
from pipeline.training.frozen_features import StoredFeatures, frozen_split_features
from pipeline.training.multi_label import label_tensor, prior_bias
from pipeline.training.trainer import Snapshot, StepRecord, Trainer

log = logging.getLogger(__name__)
HISTORY = "history.parquet"
FEATURES = "features.safetensors"


@dataclass(frozen=True)
class TrainingSpec:
    """Training or evaluation of some tasks, as sent to a worker."""

    config: Config
    splits: Artifact
    tasks: tuple[str, ...]
    label: str
    method: str = "mmap"
    training_features: Mapping[tuple[str, ...], Artifact] = field(default_factory=dict)
    """Tasks of a training set → frozen image features of its batches, for methods that use them."""
    test_features: Mapping[str, Artifact] = field(default_factory=dict)
    """Task → frozen image features of its test set, for methods that do not modify them."""

    def device(self) -> torch.device:
        """Return the GPU that Ray assigned to this worker, or the CPU, with as many threads as the training may use."""
        if DistributedShard.current().world_size > 1 and torch.cuda.is_available():
            from ray.train.torch import get_device

            return get_device()
        if ray.get_gpu_ids():
            if torch.cuda.is_available():
                return torch.device("cuda")
            log.warning(
                "Ray assigned a GPU to %r that torch %s cannot use; training on the CPU", self.label, torch.__version__
            )
        torch.set_num_threads(self.config.cluster.cpus_per_worker)
        return torch.device("cpu")

    def towers(self, float32: bool = False) -> ClipTowers:
        return load_clip(self.config.clip, self.config.mmap.text_prompt_position, str(self.device()), float32)

    def reader(self) -> SplitReader:
        return SplitReader(self.splits.download("splits.json"))  # it compares the images itself

    def class_names(self) -> dict[str, list[str]]:
        description = self.reader().description
        return {task: description.class_names_for(task) for task in self.tasks}

    def train(
        self,
        towers: ClipTowers,
        method: nn.Module,
        epochs: int,
        writer: ArtifactWriter,
        reporter: Reporter,
        **options: Any,
    ) -> list[Snapshot]:
        """Train `method` on the tasks, from the artifact's checkpoint if it exists, and write history.parquet if it
        takes steps; return the snapshots. `options`: of the trainer."""
        trainer: Trainer = self.trainer(
            towers,
            method,
            epochs,
            self._load_sets(towers),
            writer.artifact.checkpoints,
            writer.artifact.storage,
            on_step=lambda record, num_steps: reporter.update(
                record.step,
                num_steps,
                "steps",
                (record.step, step_metrics(self.tasks, record)),
                trainer.num_saved_steps,
            ),
            **options,
        )
        reports = DistributedShard.current().is_main_process and get_method(self.method).takes_steps
        if reports:
            reporter.start(trainer.num_saved_steps, trainer.num_steps, "steps", writer.is_repeated)
        history = trainer.train()
        if reports:
            write_history(writer.folder / HISTORY, self.tasks, history)
        return trainer.snapshots

    def trainer(
        self,
        towers: ClipTowers,
        method: nn.Module,
        epochs: int,
        sets: Sequence[TrainingSet],
        checkpoints: Path,
        storage: Storage,
        **options: Any,
    ) -> Trainer:
        """Build the trainer of a method from a set for each task, and from the newest checkpoint in a folder if it
        exists."""
        storage.download(checkpoints)
        config, class_names = self.config, self.class_names()
        tokens, frozen_tokens = (
            kind.tokenize(config, towers.tokenizer, class_names).to(towers.device)
            for kind in (get_method(self.method), Method)
        )
        return Trainer(
            towers,
            method,
            self._training_sets(sets),
            tokens,
            training_config(self.method, config),
            epochs=epochs,
            seed=config.seed,
            precision=config.clip.precision,
            checkpoints=Checkpoints(checkpoints, storage.upload),
            frozen_tokens=frozen_tokens,
            **options,
        )

    def _load_sets(self, towers: ClipTowers) -> list[TrainingSet]:
        if get_method(self.method).modifies_image_encoder:
            augmentation = training_config(self.method, self.config).augmentation
            threads = self.config.cluster.cpus_per_worker
            return load_training_sets(
                self.reader(), self.tasks, towers.preprocessing, augmentation.random_crop, towers.device, threads
            )
        return load_training_labels(self.reader(), self.tasks, towers.device)

    def _training_sets(self, task_sets: Sequence[TrainingSet]) -> list[TrainingSet]:
        """Return the sets from which the method's batches are drawn, with their frozen image features if the spec has
        those."""
        set_by_task = dict(zip(self.tasks, task_sets, strict=True))
        sets = [
            TrainingSet.union([set_by_task[task] for task in tasks])
            for tasks in get_method(self.method).tasks_per_set(self.tasks)
        ]
        return [
            replace(training_set, frozen_features=_features(self.training_features[training_set.tasks]))
            if training_set.tasks in self.training_features
            else training_set
            for training_set in sets
        ]

    @torch.no_grad()
    def logit_biases(self, towers: ClipTowers) -> dict[str, float]:
        """Return task → what is added to its logits (see `prior_bias`), empty unless the tasks are multi-label. Takes a
        forward pass of the training images."""
        config, reader = self.config, self.reader()
        if not reader.description.multi_label:
            return {}
        precision, class_names = config.clip.precision, self.class_names()
        tokens = Method.tokenize(config, towers.tokenizer, class_names).to(towers.device)
        with autocast(towers, precision):
            text_features = tokens.pool_names_to_classes(towers.encode_text(tokens))
        biases = {}
        for task, z in zip(self.tasks, text_features):
            x = frozen_split_features(towers, reader, task, config.cluster.cpus_per_worker, precision, split="train")
            labels = [row["label"] for row in reader.rows("train", task, ("label",))]
            logits = towers.logits(x.to(towers.device), z)
            biases[task] = prior_bias(logits, label_tensor(labels, logits.shape[1]))
        return biases

    def predictions(self, classifier: Classifier, on_images: Callable[[int], None]) -> list[AnyPrediction]:
        """Predict the tasks' complete test sets, from their frozen features where the spec has those."""
        if self.test_features:
            features = {task: _features(self.test_features[task]) for task in self.tasks}
            return evaluate_features(classifier, self.reader(), features)
        return evaluate(classifier, self.reader(), self.tasks, self.config.cluster.cpus_per_worker, on_images)


def _features(artifact: Artifact) -> StoredFeatures:
    return StoredFeatures(artifact.download() / FEATURES)


def feature_inputs(plan: Plan) -> dict[str, Any]:
    """Return the artifact inputs of frozen image features of the splits, besides the config."""
    return {"version": RESULTS_VERSION, "clip": asdict(plan.clip), "splits": plan.split_description.content}


def training_inputs(
    plan: Plan, method: str, tasks: Sequence[str], *effects: Effect, epochs: int | None = None
) -> dict[str, Any]:
    """Return the artifact inputs of a training of some tasks, or of its evaluation.

    Args:
        effects: effects of the config fields that count, see `values_affecting`.
        epochs: overrides those of the method.
    """
    config, section = plan.config, get_method(method).section
    if epochs:
        config = config.model_copy(update={"training": config.training.model_copy(update={"epochs": epochs})})
    options = values_affecting(getattr(config, section), "method") if section else {}
    options.pop("training", None)  # part of `training_config_values`
    return {
        **feature_inputs(plan),
        "method": method,
        "options": options,
        "class_names": {task: plan.split_description.class_names_for(task) for task in tasks},
        "config": training_config_values(config, method, tasks, *effects),
    }


def training_config_values(config: Config, method: str, tasks: Sequence[str], *effects: Effect) -> dict[str, Any]:
    """Return `values_affecting` for a method and some tasks: without other tasks' templates, with the training options
    of the method's own section, and without the aggregation of tasks if there is one task."""
    training = training_config(method, config)
    if len(tasks) == 1:
        training = training.model_copy(update={"aggregation": "sum"})
    templates = {task: text for task, text in config.clip.task_templates.items() if task in tasks}
    clip = config.clip.model_copy(update={"task_templates": templates})
    config = config.model_copy(update={"clip": clip, "training": training})
    return values_affecting(config, *effects)


def step_metrics(tasks: Sequence[str], record: StepRecord) -> dict[str, float]:
    """Return a step as MLflow metrics, without those of tasks that had no image in it."""
    metrics = {"learning_rate": record.learning_rate}
    for task, loss, accuracy in zip(tasks, record.losses, record.accuracies):
        if loss is not None and accuracy is not None:
            metrics |= {f"train_loss/{task}": loss, f"train_accuracy/{task}": accuracy}
    if record.weights:
        metrics |= {f"task_weight/{task}": weight for task, weight in zip(tasks, record.weights)}
    return metrics


def track_history(session: Session, name: str, artifact: Artifact) -> None:
    """Log all steps of a finished training to MLflow run `name`. The tracker skips those reported during the training;
    this adds steps lost with a driver or worker, and trainings cached from another run."""
    columns = read_parquet(artifact.download() / HISTORY).to_pydict()
    metrics_by_step: dict[int, dict[str, float]] = {}
    names = ("step", "task", "loss", "accuracy", "learning_rate", "weight")
    weights = {"weight": [None] * len(columns["step"])}  # a training with the sum has no such column
    for step, task, loss, accuracy, learning_rate, weight in zip(*((weights | columns)[name] for name in names)):
        task_weights = None if weight is None else (weight,)
        record = StepRecord(step, 0, learning_rate, (loss,), (accuracy,), task_weights)
        metrics_by_step.setdefault(step, {}).update(step_metrics([task], record))
    session.tracker.log_metric_history(name, metrics_by_step.items())


def write_history(path: Path, tasks: Sequence[str], history: Sequence[StepRecord]) -> None:
    """Write one row per (step, task): step, epoch, task, loss, accuracy on the batch, learning_rate, and the task's
    weight unless the training sums the tasks. Loss and accuracy are null if the step had no image of the task."""
    rows = [
        {
            "step": record.step,
            "epoch": record.epoch,
            "task": task,
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": record.learning_rate,
            **({"weight": record.weights[index]} if record.weights else {}),
        }
        for record in history
        for index, (task, loss, accuracy) in enumerate(zip(tasks, record.losses, record.accuracies))
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
