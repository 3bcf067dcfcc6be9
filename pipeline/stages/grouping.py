"""Stage 3: gradient snapshots → affinities → the best partition of the tasks and how sure it is, as JSON, pictures and
a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from pipeline.config import GroupingConfig
from pipeline.errors import UserError
from pipeline.grouping.advice import warnings_about
from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.gradient_blocks import gradient_blocks, read_layout
from pipeline.grouping.graph import affinity_graph
from pipeline.grouping.partition import best_partition
from pipeline.grouping.search.constraints import task_numbers
from pipeline.grouping.search.problem import Groups
from pipeline.grouping.trust import (
    bootstrap,
    groups_over_training,
    ranked_partitions,
    satisfies,
    snapshot_affinities,
)
from pipeline.report.grouping_figures import affinity_graph_picture, affinity_heat_map, together_map
from pipeline.report.grouping_page import grouping_page
from pipeline.report.grouping_trust_figures import affinity_over_training, ranked_partitions_figure
from pipeline.run import PARENT, Run
from pipeline.stages.global_prompt import SNAPSHOTS
from pipeline.stages.stage import Stage
from pipeline.storage import Artefact, read_json, write_atomically, write_json
from pipeline.training.snapshots import read_gradients, read_steps

NAME = "grouping"
FIGURES = ("affinity_heat_map.png", "affinity_graph.png")
MORE_FIGURES = ("together_map.png", "affinity_over_training.png", "ranked_partitions.png")
PAGE = "grouping.html"
SHOWN = 10
"""Partitions of the resamples, the most frequent."""
SECONDS_OF_A_RESAMPLE = 2.0
"""At most, for a search that only tells how sure the groups are."""


def solve_grouping(run: Run, global_prompt: Artefact) -> Artefact:
    """Groups the tasks unless that was done for these snapshots and this config."""
    artefact = grouping_artefact(run, global_prompt)
    with Stage(run, NAME, "3 grouping") as stage:
        stage.computed = make_grouping(run, global_prompt, artefact)
        track_grouping(run, artefact, run.config.grouping)
    return artefact


def place_task(
    run: Run, snapshots: Mapping[tuple[str, ...], Artefact], groups: Sequence[Sequence[str]], options: GroupingConfig
) -> Artefact:
    """Likewise, where the tasks that came before stay in their `groups`, and the run's only task joins one of them or
    is alone.

    Args:
        snapshots: tasks → whose gradients are in it, at the same steps; the new one's too.
        options: of the grouping, without what `groups` ask for.
    """
    tasks = sorted(task for of_file in snapshots for task in of_file)
    options = staying_together(options, groups)
    artefact = run.artefact(
        NAME,
        {
            "snapshots": [of_file.key for of_file in snapshots.values()],
            "tasks": tasks,
            **options.model_dump(mode="json"),
        },
    )
    with Stage(run, NAME, "3 place among the groups") as stage:
        if not artefact.finished():
            stage.computed = True
            files = {of_file.local() / SNAPSHOTS: names for names, of_file in snapshots.items()}
            with artefact.making() as made:
                _solve(tasks, files, options, made.folder)
        track_grouping(run, artefact, options)
    return artefact


def staying_together(options: GroupingConfig, groups: Sequence[Sequence[str]]) -> GroupingConfig:
    """With constraints that keep each of the groups whole, and apart from the others."""
    together = [*options.together, *(tuple(group) for group in groups if len(group) > 1)]
    apart = [*options.apart, *([tuple(group[0] for group in groups)] if len(groups) > 1 else [])]
    return options.model_copy(update={"together": tuple(together), "apart": tuple(apart)})


def track_grouping(run: Run, artefact: Artefact, of_run: GroupingConfig) -> None:
    """Gives a grouping to the stage's MLflow run, and tells it; `of_run`: the options it was made with."""
    options, result = of_run.model_dump(mode="json"), read_grouping(artefact)
    run.tracker.log_params(NAME, {**options, "groups": describe_groups(result["groups"])})
    run.tracker.log_metrics(NAME, {"score": result["score"], "num_groups": len(result["groups"])}, step=0)
    run.tracker.log_params(PARENT, {"groups": describe_groups(result["groups"])})
    for name in ("grouping.json", PAGE, *FIGURES, *MORE_FIGURES):
        run.tracker.log_artifact(NAME, artefact.local() / name)
    for warning in result["warnings"]:
        run.console.print(f"  [yellow]note:[/] {escape(warning)}", highlight=False)
    found = escape(f"{describe_groups(result['groups'])} · {describe_search(result)}")
    run.console.print(f"  {found}", highlight=False)


def grouping_artefact(run: Run, global_prompt: Artefact) -> Artefact:
    options = run.config.grouping.model_dump(mode="json")
    return run.artefact(NAME, {"snapshots": global_prompt.key, "tasks": run.tasks, **options})


def make_grouping(run: Run, global_prompt: Artefact, artefact: Artefact) -> bool:
    """Groups the tasks; False if that was done before."""
    if artefact.finished():
        return False
    with artefact.making() as made:
        _solve(run.tasks, {global_prompt.local() / SNAPSHOTS: run.tasks}, run.config.grouping, made.folder)
    return True


def _snapshots(
    tasks: Sequence[str], files: Mapping[Path, Sequence[str]]
) -> tuple[dict[str, list[int]], list[int], np.ndarray]:
    """Layout, steps (S,), and gradients (S, T, P) of the tasks, in their order.

    Raises:
        UserError: a file that is damaged, or whose snapshots are others than the first one's.
    """
    of_task: dict[str, np.ndarray] = {}
    layouts, steps = [], []
    for file, of_file in files.items():
        layouts.append(read_layout(file))
        steps.append(read_steps(file))
        of_task |= zip(of_file, read_gradients(file, of_file).swapaxes(0, 1))
        if (layouts[-1], steps[-1]) != (layouts[0], steps[0]):
            raise UserError(f"{file} holds other snapshots than {next(iter(files))}: remove its folder and run again")
    return layouts[0], steps[0], np.stack([of_task[task] for task in tasks], axis=1)


def read_grouping(artefact: Artefact) -> dict[str, Any]:
    grouping: dict[str, Any] = read_json(artefact.local() / "grouping.json")
    return grouping


def describe_groups(groups: list[list[str]]) -> str:
    return " | ".join(" + ".join(group) for group in groups)


def describe_search(result: dict[str, Any]) -> str:
    """How the groups of a grouping.json were found."""
    count = result["num_candidates"]
    among = "" if count is None else f" of {count:,} partitions" if count < 10**15 else f" of {count:.1e} partitions"
    return f"{'best' if result['proven'] else 'best found'}{among} · {result['method']}"


def _solve(tasks: Sequence[str], files: Mapping[Path, Sequence[str]], options: GroupingConfig, folder: Path) -> None:
    """`files`: snapshots → the tasks whose gradients are taken from it."""
    layout, steps, gradients = _snapshots(tasks, files)
    blocks = gradient_blocks(layout, per_layer=options.per_layer, scaling_matrices=options.scaling_matrices)
    affinity = affinity_matrix(gradients, options.affinity, tasks=tasks, blocks=blocks)
    partition = best_partition(
        affinity,
        objective=options.objective,
        **options.constraints,
        tasks=tasks,
        time_limit_s=options.time_limit_s,
    )
    warnings = warnings_about(
        affinity, partition, tasks, objective=options.objective, kind=options.affinity, per_layer=options.per_layer
    )
    affinities = snapshot_affinities(gradients, options.affinity, blocks)

    def search(matrix: np.ndarray) -> Groups:
        seconds = min(options.time_limit_s, SECONDS_OF_A_RESAMPLE)
        return best_partition(
            matrix, objective=options.objective, **options.constraints, tasks=tasks, time_limit_s=seconds
        ).groups

    def named(groups: Groups) -> list[list[str]]:
        return [[tasks[i] for i in group] for group in groups]

    numbers = {name: task_numbers(tasks, name, options.constraints[name]) for name in ("together", "apart")}
    sure = bootstrap(affinities, search)
    ranked = ranked_partitions(
        affinity, partition.groups, options.objective, tasks, partial(satisfies, **{**options.constraints, **numbers})
    )
    result = {
        "tasks": tasks,
        "groups": named(partition.groups),
        "score": partition.score,
        "bound": partition.bound,
        "proven": partition.proven,
        "method": partition.method,
        "num_candidates": partition.num_candidates,
        "objective": options.objective,
        "affinity_kind": options.affinity,
        "per_layer": options.per_layer,
        "scaling_matrices": options.scaling_matrices,
        "constraints": options.constraints,
        "num_snapshots": len(gradients),
        "affinity": affinity.tolist(),
        "warnings": warnings,
        "trust": {
            "num_resamples": sure.num_resamples,
            "together": sure.together.tolist(),
            "resampled": [
                {"groups": named(groups), "share": share} for groups, share in list(sure.shares.items())[:SHOWN]
            ],
            "ranked": [{"groups": named(of.groups), "score": float(of.score)} for of in ranked],
            "over_training": [
                {"first_step": first, "last_step": last, "groups": named(groups)}
                for first, last, groups in groups_over_training(affinities, steps, search)
            ],
        },
    }
    write_json(folder / "grouping.json", result)
    figures = {
        "Affinities": affinity_heat_map(affinity, tasks, partition.groups),
        "Graph": affinity_graph_picture(affinity_graph(affinity, tasks, partition.groups)),
        "How sure each pair is": together_map(sure.together, tasks, partition.groups),
        "Over the training": affinity_over_training(affinities, steps, tasks, partition.groups),
        "What comes close": ranked_partitions_figure(ranked),
    }
    for figure, name in zip(figures.values(), (*FIGURES, *MORE_FIGURES), strict=True):
        figure.savefig(folder / name, dpi=150)
    search_in_words = describe_search(result)
    page = grouping_page(result, search_in_words[0].upper() + search_in_words[1:], figures)
    write_atomically(folder / PAGE, page)
