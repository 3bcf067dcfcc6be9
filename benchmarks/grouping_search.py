#!/usr/bin/env python
"""How long each way to search the best grouping takes, beside plain enumeration and TAG's scoring of all groups.

    python benchmarks/grouping_search.py                        8 to 20 tasks each way; 24 to 40 by best_partition
    python benchmarks/grouping_search.py --tasks 8 12 --many-tasks 40

Affinities are cosines of made-up gradients around five directions, with noise twice as long, which have groups to
find; and normal random numbers, which have none and are the hardest case. Ways that run on the same problem must find
the same score. TAG (google-research/tag) scores every possible group by each task's mean affinity to the others; it
then searches groups that may overlap, which is not timed here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from common import device_name, fastest_seconds, table, write_results

from pipeline.grouping.objectives import OBJECTIVES, get_objective
from pipeline.grouping.partition import TIME_LIMIT_S, best_partition
from pipeline.grouping.search.integer_program import IntegerProgram
from pipeline.grouping.search.local_search import heuristic_partition
from pipeline.grouping.search.problem import Problem
from pipeline.grouping.search.subsets import solve_subset_dp
from pipeline.grouping.study import partition_score, set_partitions

CPU = torch.device("cpu")
MAX_TASKS_PLAIN_PYTHON, MAX_TASKS_TAG = 10, 16
"""Tasks up to which a slow way is run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", type=int, default=[8, 10, 12, 14, 16, 18, 20], help="each way")
    parser.add_argument("--many-tasks", nargs="*", type=int, default=[24, 30, 40], help="best_partition")
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S, help="of the integer program")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    limit = arguments.time_limit_s

    ways = [ways_row(num_tasks, arguments.repeats, limit) for num_tasks in arguments.tasks]
    options = [options_row(num_tasks, arguments.repeats) for num_tasks in arguments.tasks]
    many = [
        many_row(kind, num_tasks, objective, limit)
        for num_tasks in arguments.many_tasks
        for kind in ("directions", "random")
        for objective in OBJECTIVES
    ]

    print(f"Seconds on {device_name(CPU)}, fastest of {arguments.repeats}; `sum`, affinities around five directions\n")
    print(table(["tasks", *list(ways[0]["seconds"])], [[row["tasks"], *shown(row["seconds"])] for row in ways]))
    print("\nDynamic programming over subsets, random affinities\n")
    print(table(["tasks", *list(options[0]["seconds"])], [[row["tasks"], *shown(row["seconds"])] for row in options]))
    print(f"\n`best_partition`, one run, at most {limit:g} s\n")
    columns = ["affinities", "tasks", "objective", "s", "gap", "way"]
    print(table(columns, [[*list(row.values())[:3], seconds(row["seconds"]), gap(row), row["way"]] for row in many]))
    values = {"time_limit_s": limit, "repeats": arguments.repeats, "ways": ways, "options": options, "many": many}
    write_results("grouping_search", CPU, values)


def affinities(kind: str, num_tasks: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    if kind == "random":
        half = rng.normal(size=(num_tasks, num_tasks))
        return half + half.T
    gradients = rng.normal(size=(5, 500))[rng.integers(0, 5, num_tasks)] + 2 * rng.normal(size=(num_tasks, 500))
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients @ gradients.T


def ways_row(num_tasks: int, repeats: int, limit: float) -> dict:
    """Seconds of each way for `sum`; None where it would take too long."""
    affinity = affinities("directions", num_tasks)
    problem = Problem.from_affinity(affinity, get_objective("sum"))

    def integer_program() -> list[tuple[int, ...]]:
        return IntegerProgram(problem).solve(heuristic_partition(problem, limit / 10), limit)[0]

    searches: dict[str, Callable] = {
        "plain Python": lambda: max(set_partitions(num_tasks), key=lambda of: partition_score(affinity, of, "sum")),
        "subsets": lambda: solve_subset_dp(problem),
        "integer program": integer_program,
        "best_partition": lambda: best_partition(affinity).groups,
    }
    most = {"plain Python": MAX_TASKS_PLAIN_PYTHON}
    run = {name: search for name, search in searches.items() if num_tasks <= most.get(name, num_tasks)}
    scores = {name: problem.score(search()) for name, search in run.items()}  # warms up as well
    if np.ptp(list(scores.values())) > 1e-6:
        sys.exit(f"{num_tasks} tasks: the ways differ: {scores}")
    if num_tasks <= MAX_TASKS_TAG:
        run["TAG's scores"] = lambda: tag_scores(affinity.tolist())
    measured = fastest_seconds(run, repeats, CPU)
    row = {"tasks": num_tasks, "seconds": {name: measured.get(name) for name in [*searches, "TAG's scores"]}}
    print(row, file=sys.stderr, flush=True)
    return row


def options_row(num_tasks: int, repeats: int) -> dict:
    affinity = affinities("random", num_tasks)
    options = {
        **{name: {"objective": objective} for name, objective in OBJECTIVES.items()},
        "4 groups": {"objective": get_objective("sum"), "num_groups": 4},
        "at most 5 tasks": {"objective": get_objective("sum"), "max_size": 5},
    }
    runs = {name: lambda of=of: solve_subset_dp(Problem.from_affinity(affinity, **of)) for name, of in options.items()}
    row = {"tasks": num_tasks, "seconds": fastest_seconds(runs, repeats, CPU)}
    print(row, file=sys.stderr, flush=True)
    return row


def many_row(kind: str, num_tasks: int, objective: str, limit: float) -> dict:
    affinity, found = affinities(kind, num_tasks), []
    search = {"it": lambda: found.append(best_partition(affinity, objective=objective, time_limit_s=limit))}
    took = fastest_seconds(search, 1, CPU)["it"]
    row = {"affinities": kind, "tasks": num_tasks, "objective": objective, "seconds": took, "way": found[0].method}
    row |= {"score": found[0].score, "upper_bound": found[0].upper_bound}
    print(row, file=sys.stderr, flush=True)
    return row


def tag_scores(affinity: list[list[float]]) -> dict[tuple[int, ...], list[float]]:
    """Every group's tasks' mean affinities to the others, in plain Python as TAG does it."""
    tasks = range(len(affinity))
    return {
        group: [sum(affinity[i][j] for j in group if j != i) / max(len(group) - 1, 1) for i in group]
        for size in range(1, len(affinity) + 1)
        for group in combinations(tasks, size)
    }


def shown(values: dict[str, float | None]) -> list[str]:
    return ["–" if value is None else seconds(value) for value in values.values()]


def seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def gap(row: dict) -> str:
    """Of the bound over the score; proven best: 0."""
    return "0" if row["upper_bound"] == row["score"] else f"{100 * (row['upper_bound'] / row['score'] - 1):.1f} %"


if __name__ == "__main__":
    main()
