"""Points of a search space: all of a grid, or draws. A point that cannot be is never tried."""

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
"""In vain, before a space counts as having no more points."""
Point = dict[str, Any]
"""Field → value."""
Check = Callable[[Mapping[str, Any]], None]
"""Raises UserError, which says why a point cannot be."""


@dataclass(frozen=True)
class Points:
    """`refused`: how many were left out since their values do not go together; `reason`: why one of them."""

    points: tuple[Point, ...]
    refused: int
    reason: str


def planned_points(search: Search, check: Check) -> Points:
    """The points of a grid or random search, in the order in which they are tried; of a search that chooses its points
    as it goes on, a first one that can be.

    Raises:
        UserError: none can be; a grid has more than MAX_TRIALS.
    """
    options, refused, reason = search.options, 0, ""
    if options.searcher == "grid":
        number = math.prod(len(of.values) for of in search.space.values())
        if number > MAX_TRIALS:
            raise UserError(
                f"the grid has {number:,} points, more than {MAX_TRIALS:,}: fewer values, or searcher random"
            )
        grid = product(*(of.values for of in search.space.values()))
        candidates: Iterator[Point] = (dict(zip(search.space, values)) for values in grid)
    else:
        number = options.trials or 1 if options.searcher == "random" else 1
        candidates = draws(search.space, options.seed)
    found: dict[str, Point] = {}
    seen: set[str] = set()
    in_vain = 0
    for values in candidates:
        point = search.point(values)
        name, in_vain = json.dumps(point), in_vain + 1
        if name not in seen:
            seen.add(name)
            try:
                check(point)
                found[name], in_vain = point, 0
            except UserError as error:
                refused, reason = refused + 1, str(error)
        if len(found) == number or (in_vain == MAX_REJECTED_SAMPLES and options.searcher != "grid"):
            break
    if not found:
        raise UserError(f"no point of the search can be: {reason}")
    return Points(tuple(found.values()), refused, reason)


def draws(space: Mapping[str, Range], seed: int) -> Iterator[Point]:
    """Points without end, as the seed says; not all of them can be."""
    generator = random.Random(seed)
    while True:
        yield {name: _draw(of, generator) for name, of in space.items()}


def _draw(of: Range, generator: random.Random) -> Any:
    if of.kind == "choice":
        return of.values[generator.randrange(len(of.values))]
    low, high = of.values
    if of.kind == "integer":
        return generator.randint(low, high)
    if of.kind == "uniform":
        return generator.uniform(low, high)
    return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)
