"""Stage 3: gradient snapshots → affinities → the best partition of the tasks and how sure it is, as JSON, pictures and
a page."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from rich.markup import escape

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
        options, result = run.config.grouping.model_dump(mode="json"), read_grouping(artefact)
        run.tracker.log_params(NAME, {**options, "groups": describe_groups(result["groups"])})
        run.tracker.log_metrics(NAME, {"score": result["score"], "num_groups": len(result["groups"])}, step=0)
        run.tracker.log_params(PARENT, {"groups": describe_groups(result["groups"])})
        for name in ("grouping.json", PAGE, *FIGURES, *MORE_FIGURES):
            run.tracker.log_artifact(NAME, artefact.local() / name)
        for warning in result["warnings"]:
            run.console.print(f"  [yellow]note:[/] {escape(warning)}", highlight=False)
        found = escape(f"{describe_groups(result['groups'])} · {describe_search(result)}")
        run.console.print(f"  {found}", highlight=False)
    return artefact


def grouping_artefact(run: Run, global_prompt: Artefact) -> Artefact:
    options = run.config.grouping.model_dump(mode="json")
    return run.artefact(NAME, {"snapshots": global_prompt.key, "tasks": run.tasks, **options})


def make_grouping(run: Run, global_prompt: Artefact, artefact: Artefact) -> bool:
    """Groups the tasks; False if that was done before."""
    if artefact.finished():
        return False
    with artefact.making() as made:
        _solve(run, global_prompt.local() / SNAPSHOTS, made.folder)
    return True


def read_grouping(artefact: Artefact) -> dict:
    return read_json(artefact.local() / "grouping.json")


def describe_groups(groups: list[list[str]]) -> str:
    return " | ".join(" + ".join(group) for group in groups)


def describe_search(result: dict) -> str:
    """How the groups of a grouping.json were found."""
    count = result["num_candidates"]
    among = "" if count is None else f" of {count:,} partitions" if count < 10**15 else f" of {count:.1e} partitions"
    return f"{'best' if result['proven'] else 'best found'}{among} · {result['method']}"


def _solve(run: Run, snapshots: Path, folder: Path) -> None:
    tasks, options = run.tasks, run.config.grouping
    layout = read_layout(snapshots)
    gradients = read_gradients(snapshots, tasks)
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
    steps = read_steps(snapshots)
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
