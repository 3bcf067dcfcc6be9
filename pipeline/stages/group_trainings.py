"""Stage 4: one training a group, in parallel (Eqs. 9-12), beside all tasks in one group, other methods, and
zero-shot CLIP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.clip.load import weights_fingerprint
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.classifier import Classifier
from pipeline.methods.prompt_file import TrainedPrompts, save_prompts
from pipeline.methods.registry import ALWAYS, VERSIONS, kind_of
from pipeline.progress import Reporter
from pipeline.run import Run
from pipeline.seeds import derive_seed
from pipeline.stages.grouping import read_grouping
from pipeline.stages.stage import Stage, Work
from pipeline.stages.training_work import TrainingWork, numbers_decided_by, track_history, trainings_decided_by
from pipeline.storage import Artefact, read_json, write_json
from pipeline.training.evaluate import accuracy, evaluate, write_predictions
from pipeline.training.share import Share

NAME = "group_trainings"
PROMPTS = "prompts.safetensors"


@dataclass(frozen=True)
class MethodArtefacts:
    """Where the results of one method lie: an artefact for each of its groups."""

    name: str
    groups: tuple[tuple[str, ...], ...]
    artefacts: tuple[Artefact, ...]

    def results(self) -> list[dict]:
        """Each artefact's result.json: accuracy (task → 0-1), trained_parameters, seconds."""
        return [read_json(artefact.folder / "result.json") for artefact in self.artefacts]


def train_groups(run: Run, grouping: Artefact) -> list[MethodArtefacts]:
    """Trains and evaluates what is missing of zero-shot CLIP, the methods to compare, and MmAP with all tasks in one
    group and in the groups found; the largest groups first."""
    config, tasks = run.config, tuple(run.tasks)
    found = tuple(tuple(group) for group in read_grouping(grouping)["groups"])
    groups_of = {
        "each task": tuple((task,) for task in tasks),
        "all tasks": (tasks,),
        "found groups": found,
        "random groups": random_groups(tasks, [len(group) for group in found], config.seed),
    }
    plan = [("zero_shot", "zero_shot", (tasks,))]
    for name in (*config.compare, *ALWAYS):
        plan.append((name, VERSIONS[name].kind, groups_of[VERSIONS[name].groups]))
    methods = []
    with Stage(run, NAME, "4 group trainings") as stage:
        work = {}  # by key: a grouping with one group is the same training as all in one
        for name, method, groups in plan:
            artefacts = []
            for tasks in groups:
                label = name.replace("_", " ")
                if name == "grouped" or len(groups) > 1:
                    label = f"{'group' if name == 'grouped' else label}: {' + '.join(tasks)}"
                if method == "zero_shot":
                    artefact, function = run.artefact(method, numbers_decided_by(run, tasks)), _evaluate_zero_shot
                else:
                    decided_by = trainings_decided_by(run, tasks, config.training.epochs, method)
                    artefact, function = run.artefact(NAME, {**decided_by, "group": list(tasks)}), _train_group
                artefacts.append(artefact)
                if artefact.key not in work:
                    run.tracker.start_run(label, parent=NAME, tags={"method": name, "tasks": ", ".join(tasks)})
                    item = TrainingWork(config, run.splits.folder, tasks, label, method)
                    workers = config.cluster.workers_per_training
                    work[artefact.key] = Work(label, function, (item, artefact), artefact, True, workers, label)
            methods.append(MethodArtefacts(name, groups, tuple(artefacts)))
        stage.execute(sorted(work.values(), key=lambda item: -len(item.arguments[0].tasks)))
        for item in work.values():
            result = read_json(item.artefact.folder / "result.json")
            run.tracker.log_metrics(
                item.label,
                {
                    **{f"accuracy/{task}": value for task, value in result["accuracy"].items()},
                    "accuracy/average": sum(result["accuracy"].values()) / len(result["accuracy"]),
                    "trained_parameters": result["trained_parameters"],
                    "training_seconds": result["seconds"],
                },
                step=0,
            )
            if item.function is _train_group:
                track_history(run, item.label, item.artefact)
                run.tracker.log_artifact(item.label, item.artefact.folder / PROMPTS)
            run.tracker.end_run(item.label)
    return methods


def random_groups(tasks: Sequence[str], sizes: Sequence[int], seed: int) -> tuple[tuple[str, ...], ...]:
    """A partition into groups of these sizes, which depends on the seed alone; tasks keep their order in a group."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "random groups"))
    drawn = torch.randperm(len(tasks), generator=generator).split(list(sizes))
    return tuple(tuple(tasks[at] for at in sorted(group.tolist())) for group in drawn)


def _train_group(work: TrainingWork, artefact: Artefact, board: Any) -> None:
    if artefact.finished():  # by an attempt whose worker died before it could say so
        return
    began = time.monotonic()
    folder = artefact.start()
    kind, reporter = kind_of(work.method), Reporter(board, work.label)
    config, towers, words = work.config, work.towers(kind.trains_weights), work.words()
    method = kind.build(config, towers, work.tasks).to(towers.device)
    work.train(towers, method, config.training.epochs, artefact, reporter)
    trained = TrainedPrompts(work.method, config, weights_fingerprint(towers), (words,), (dict(method.state_dict()),))
    if Share.of_this_process().first:
        save_prompts(folder / PROMPTS, trained)
    with torch.no_grad():
        classifier = Classifier(towers, kind.template(config), [(words, method())], config.clip.precision)
    _write_result(work, artefact, classifier, reporter, trained.num_parameters, began)


def _evaluate_zero_shot(work: TrainingWork, artefact: Artefact, board: Any) -> None:
    if artefact.finished():
        return
    began = time.monotonic()
    artefact.start()
    clip = work.config.clip
    classifier = Classifier(work.towers(), clip.template, [(work.words(), Adaptation())], clip.precision)
    _write_result(work, artefact, classifier, Reporter(board, work.label), 0, began)


def _write_result(
    work: TrainingWork, artefact: Artefact, classifier: Classifier, reporter: Reporter, parameters: int, began: float
) -> None:
    reader, share, done = work.reader(), Share.of_this_process(), 0
    total = sum(reader.description.counts["test"][task] for task in work.tasks)

    def on_images(count: int) -> None:
        nonlocal done
        done = min(done + count * share.world, total)
        if share.first:
            reporter.update(done, total, "test images")

    predictions = evaluate(classifier, reader, work.tasks, work.config.cluster.cpus_per_training, on_images)
    if not share.first:
        return
    write_predictions(artefact.building / "predictions.parquet", predictions)
    seconds = time.monotonic() - began
    write_json(
        artefact.building / "result.json",
        {"accuracy": accuracy(predictions), "trained_parameters": parameters, "seconds": seconds},
    )
    artefact.finish(seconds)
