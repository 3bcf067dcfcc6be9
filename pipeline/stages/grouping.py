"""Stage 3: gradient snapshots → affinities → the best partition of the tasks, as JSON and two pictures."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.graph import affinity_graph
from pipeline.grouping.partition import best_partition, warnings_about
from pipeline.report.grouping_figures import affinity_graph_picture, affinity_heat_map
from pipeline.run import PARENT, Run
from pipeline.stages.global_prompt import SNAPSHOTS
from pipeline.stages.stage import Stage
from pipeline.storage import Artefact, read_json, write_json
from pipeline.training.snapshots import read_gradients

NAME = "grouping"
FIGURES = ("affinity_heat_map.png", "affinity_graph.png")


def solve_grouping(run: Run, global_prompt: Artefact) -> Artefact:
    """Groups the tasks unless that was done for these snapshots and this config."""
    options = run.config.grouping.model_dump(mode="json")
    artefact = run.artefact(NAME, {"snapshots": global_prompt.key, "tasks": run.tasks, **options})
    with Stage(run, NAME, "3 grouping") as stage:
        if not artefact.finished():
            began = time.monotonic()
            stage.computed = True
            _solve(run, global_prompt.folder / SNAPSHOTS, artefact.start())
            artefact.finish(time.monotonic() - began)
        result = read_grouping(artefact)
        run.tracker.log_params(NAME, {**options, "groups": describe_groups(result["groups"])})
        run.tracker.log_metrics(NAME, {"score": result["score"], "num_groups": len(result["groups"])}, step=0)
        run.tracker.log_params(PARENT, {"groups": describe_groups(result["groups"])})
        for name in ("grouping.json", *FIGURES):
            run.tracker.log_artifact(NAME, artefact.folder / name)
        for warning in result["warnings"]:
            run.console.print(f"  [yellow]note:[/] {warning}", highlight=False)
        run.console.print(
            f"  {describe_groups(result['groups'])} · best of {result['num_candidates']:,} partitions", highlight=False
        )
    return artefact


def read_grouping(artefact: Artefact) -> dict:
    return read_json(artefact.folder / "grouping.json")


def describe_groups(groups: list[list[str]]) -> str:
    return " | ".join(" + ".join(group) for group in groups)


def _solve(run: Run, snapshots: Path, folder: Path) -> None:
    tasks, options = run.tasks, run.config.grouping
    gradients = read_gradients(snapshots, tasks)
    affinity = affinity_matrix(gradients, options.affinity, tasks=tasks)
    partition = best_partition(
        affinity,
        objective=options.objective,
        num_groups=options.num_groups,
        min_size=options.min_size,
        max_size=options.max_size,
    )
    write_json(
        folder / "grouping.json",
        {
            "tasks": tasks,
            "groups": [[tasks[i] for i in group] for group in partition.groups],
            "score": partition.score,
            "num_candidates": partition.num_candidates,
            "objective": options.objective,
            "affinity_kind": options.affinity,
            "num_snapshots": len(gradients),
            "affinity": affinity.tolist(),
            "warnings": warnings_about(affinity, partition, tasks, objective=options.objective, kind=options.affinity),
        },
    )
    heat_map = affinity_heat_map(affinity, tasks, partition.groups)
    graph = affinity_graph_picture(affinity_graph(affinity, tasks, partition.groups))
    for figure, name in zip((heat_map, graph), FIGURES):
        figure.savefig(folder / name, dpi=150)
