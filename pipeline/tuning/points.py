"""Points of a search space: all of a grid, or samples. Invalid points are skipped."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from pipeline.errors import UserError
from pipeline.tuning.search_file import MAX_TRIALS, Range, Search

MAX_REJECTED_SAMPLES = 1000
"""Consecutive rejected samples after which a space counts as exhausted."""
TrialParams = dict[str, Any]
"""Field → value."""
Check = Callable[[Mapping[str, Any]], None]
"""Raises UserError with the reason if the params are invalid."""


@dataclass(frozen=True)
class PlannedTrials:
    """`num_invalid`: points skipped because their values contradict each other; `reason`: of one of them."""

    params: tuple[TrialParams, ...]
    num_invalid: int
    reason: str


def plan_trials(search: Search, check: Check) -> PlannedTrials:
    """Return the trials of a grid or random search in the order in which they run; for Optuna, which chooses its own,
    one valid point.

    Raises:
        UserError: no point is valid; a grid has more than MAX_TRIALS points.
    """
    options, num_invalid, reason = search.options, 0, ""
    if options.searcher == "grid":
        num_trials = math.prod(len(value_range.values) for value_range in search.space.values())
        if num_trials > MAX_TRIALS:
            raise UserError(
                f"the grid has {num_trials:,} points (limit {MAX_TRIALS:,}): use fewer values or searcher: random"
            )
        grid = product(*(value_range.values for value_range in search.space.values()))
        candidates: Iterator[dict[str, Any]] = (dict(zip(search.space, values)) for values in grid)
    else:
        num_trials = options.trials or 1 if options.searcher == "random" else 1
        candidates = sample_points(search.space, options.seed)
    valid_params: dict[str, TrialParams] = {}
    visited: set[str] = set()
    num_rejected = 0
    for point in candidates:
        params = search.trial_params(point)
        name, num_rejected = json.dumps(params), num_rejected + 1
        if name not in visited:
            visited.add(name)
            try:
                check(params)
                valid_params[name], num_rejected = params, 0
            except UserError as error:
                num_invalid, reason = num_invalid + 1, str(error)
        if len(valid_params) == num_trials or (num_rejected == MAX_REJECTED_SAMPLES and options.searcher != "grid"):
            break
    if not valid_params:
        raise UserError(f"the search space has no valid configuration: {reason}")
    return PlannedTrials(tuple(valid_params.values()), num_invalid, reason)


def sample_points(space: Mapping[str, Range], seed: int) -> Iterator[dict[str, Any]]:
    """Yield random points without end, valid or not, determined by the seed."""
    generator = random.Random(seed)
    while True:
        yield {name: _sample(value_range, generator) for name, value_range in space.items()}


def _sample(value_range: Range, generator: random.Random) -> Any:
    if value_range.kind == "choice":
        return value_range.values[generator.randrange(len(value_range.values))]
    low, high = value_range.values
    if value_range.kind == "integer":
        return generator.randint(low, high)
    if value_range.kind == "uniform":
        return generator.uniform(low, high)
    return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)
