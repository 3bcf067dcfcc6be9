#!/usr/bin/env python
"""Time every algorithm for the best grouping, beside plain enumeration and TAG's scoring of all groups.

    python benchmarks/grouping_search.py                        8 to 20 tasks: every algorithm; 24 to 40: best_partition
    python benchmarks/grouping_search.py --tasks 8 12 --many-tasks 40

Affinities are cosines of synthetic gradients around five directions, with noise twice as large, which have groups; and
normal random numbers, which have none and are the hardest case. Algorithms must find equal scores on the same problem.
TAG (google-research/tag) scores every possible group by each task's mean affinity to the other tasks; its search for
overlapping groups is not timed here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from common import device_name, median_seconds, table, write_results

from pipeline.grouping.objectives import OBJECTIVES, get_objective
from pipeline.grouping.partition import TIME_LIMIT_S, best_partition
from pipeline.grouping.search.integer_program import IntegerProgram
from pipeline.grouping.search.local_search import heuristic_partition
from pipeline.grouping.search.problem import Groups, Problem
from pipeline.grouping.search.subsets import solve_subset_dp
from pipeline.grouping.study import partition_score, set_partitions

CPU = torch.device("cpu")
MAX_TASKS_PLAIN_PYTHON, MAX_TASKS_TAG = 10, 16
"""Maximum number of tasks for the slow algorithms."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", type=int, default=[8, 10, 12, 14, 16, 18, 20], help="all algorithms")
    parser.add_argument("--many-tasks", nargs="*", type=int, default=[24, 30, 40], help="best_partition only")
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S, help="time limit of the integer program")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    limit = arguments.time_limit_s

    algorithms = [algorithms_row(num_tasks, arguments.repeats, limit) for num_tasks in arguments.tasks]
    options = [options_row(num_tasks, arguments.repeats) for num_tasks in arguments.tasks]
    large = [
        large_row(kind, num_tasks, objective, limit)
        for num_tasks in arguments.many_tasks
        for kind in ("directions", "random")
        for objective in OBJECTIVES
    ]

    print(f"Seconds on {device_name(CPU)}, median of {arguments.repeats}; `sum`, affinities around five directions\n")
    print(
        table(["tasks", *algorithms[0]["seconds"]], [[row["tasks"], *formatted(row["seconds"])] for row in algorithms])
    )
    print("\nDynamic programming over subsets, random affinities\n")
    print(table(["tasks", *options[0]["seconds"]], [[row["tasks"], *formatted(row["seconds"])] for row in options]))
    print(f"\n`best_partition`, one run, at most {limit:g} s\n")
    columns = ["affinities", "tasks", "objective", "s", "gap", "method"]
    print(
        table(columns, [[*list(row.values())[:3], seconds(row["seconds"]), gap(row), row["method"]] for row in large])
    )
    tables = {"algorithms": algorithms, "options": options, "large": large}
    values = {"time_limit_s": limit, "repeats": arguments.repeats, **tables}
    write_results("grouping_search", CPU, values)


def affinities(kind: str, num_tasks: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    if kind == "random":
        half = rng.normal(size=(num_tasks, num_tasks))
        return half + half.T
    gradients = rng.normal(size=(5, 500))[rng.integers(0, 5, num_tasks)] + 2 * rng.normal(size=(num_tasks, 500))
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients @ gradients.T


def algorithms_row(num_tasks: int, repeats: int, limit: float) -> dict:
    """Time every algorithm for `sum`; None where it would take too long."""
    affinity = affinities("directions", num_tasks)
    problem = Problem.from_affinity(affinity, get_objective("sum"))

    def integer_program() -> list[tuple[int, ...]]:
        return IntegerProgram(problem).solve(heuristic_partition(problem, limit / 10), limit)[0]

    def plain_score(groups: Groups) -> float:
        return partition_score(affinity, groups, "sum")

    searches: dict[str, Callable] = {
        "plain Python": lambda: max(set_partitions(num_tasks), key=plain_score),
        "subsets": lambda: solve_subset_dp(problem),
        "integer program": integer_program,
        "best_partition": lambda: best_partition(affinity).groups,
    }
    max_tasks = {"plain Python": MAX_TASKS_PLAIN_PYTHON}
    run = {name: search for name, search in searches.items() if num_tasks <= max_tasks.get(name, num_tasks)}
    scores = {name: problem.score(search()) for name, search in run.items()}  # warms up as well
    if np.ptp(list(scores.values())) > 1e-6:
        sys.exit(f"{num_tasks} tasks: the algorithms found different scores: {scores}")
    if num_tasks <= MAX_TASKS_TAG:
        run["TAG's scores"] = lambda: tag_scores(affinity.tolist())
    measured = median_seconds(run, repeats, CPU)
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
    runs = {
        name: lambda kwargs=kwargs: solve_subset_dp(Problem.from_affinity(affinity, **kwargs))
        for name, kwargs in options.items()
    }
    row = {"tasks": num_tasks, "seconds": median_seconds(runs, repeats, CPU)}
    print(row, file=sys.stderr, flush=True)
    return row


def large_row(kind: str, num_tasks: int, objective: str, limit: float) -> dict:
    affinity, results = affinities(kind, num_tasks), []
    search = {"": lambda: results.append(best_partition(affinity, objective=objective, time_limit_s=limit))}
    row = {"affinities": kind, "tasks": num_tasks, "objective": objective}
    row |= {"seconds": median_seconds(search, 1, CPU)[""], "method": results[0].method}
    row |= {"score": results[0].score, "upper_bound": results[0].upper_bound}
    print(row, file=sys.stderr, flush=True)
    return row


def tag_scores(affinity: list[list[float]]) -> dict[tuple[int, ...], list[float]]:
    """Compute the mean affinities of every group's tasks to the other members, in plain Python like TAG."""
    tasks = range(len(affinity))
    return {
        group: [sum(affinity[i][j] for j in group if j != i) / max(len(group) - 1, 1) for i in group]
        for size in range(1, len(affinity) + 1)
        for group in combinations(tasks, size)
    }


def formatted(values: dict[str, float | None]) -> list[str]:
    return ["–" if value is None else seconds(value) for value in values.values()]


def seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def gap(row: dict) -> str:
    """Format the gap of the upper bound to the score; 0 if proven optimal."""
    return "0" if row["upper_bound"] == row["score"] else f"{100 * (row['upper_bound'] / row['score'] - 1):.1f} %"


if __name__ == "__main__":
    main()
