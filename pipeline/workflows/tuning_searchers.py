"""Ray Tune's parts of a search: Optuna, early stopping, and the callback that tells of trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, ClassVar, cast

from optuna.logging import WARNING, set_verbosity
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.methods.registry import VARIANTS, training_config
from pipeline.tuning.points import MAX_REJECTED_SAMPLES, Check, Point, draws
from pipeline.tuning.search_file import METHOD, Range, Search
from pipeline.tuning.trials import State, Trial
from pipeline.workflows.tuning_trial import ACCURACY, EPOCH, FAULT, METRIC, PARAMETERS, WHOLE

set_verbosity(WARNING)
MAX_OPTUNA_SAMPLES = 100
"""For one point, until it is drawn at random: in a small space Optuna asks for the best point again and again."""


class OptunaPoints(OptunaSearch):
    """Optuna's TPE, which tries no point twice and none that cannot be. Ray Tune pickles it with the search."""

    def __init__(self, search: Search, check: Check):
        self._search, self._check = search, check
        self._tried: set[str] = set()
        self._asked_as: dict[str, str] = {}
        """Trial → its id in Optuna, which gives an id the same point again."""
        sampler = TPESampler(seed=search.options.seed, constant_liar=True)
        super().__init__(partial(_suggest_point, search), METRIC, "max", sampler=sampler)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """{"trial": {"number", "point"}}; FINISHED when the space has no more points."""
        for draw in range(MAX_OPTUNA_SAMPLES):
            asked_as = f"{trial_id} {draw}"
            point = self._decoded(super().suggest(asked_as) or {})
            tried = json.dumps(point) in self._tried
            if not tried and self._can_be(point):
                self._asked_as[trial_id] = asked_as
                return self._begun(point)
            # To Optuna, what cannot be is pruned, which is bad; what was tried before is a fault, which says nothing.
            super().on_trial_complete(asked_as, error=tried)
        candidates = draws(self._search.space, self._search.options.seed + len(self._tried))
        for values in islice(candidates, MAX_REJECTED_SAMPLES):
            point = self._search.point(values)
            if json.dumps(point) not in self._tried and self._can_be(point):
                return self._begun(point)
        return cast(dict[str, Any], self.FINISHED)  # a string, which Ray's types do not tell

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass  # TPE goes by what trials had at their end

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if asked_as := self._asked_as.get(trial_id):  # else Optuna did not choose its point
            super().on_trial_complete(asked_as, result, error)

    def _begun(self, point: Point) -> dict[str, Any]:
        self._tried.add(json.dumps(point))
        return {"trial": {"number": len(self._tried) - 1, "point": point}}

    def _can_be(self, point: Point) -> bool:
        try:
            self._check(point)
            return True
        except UserError:
            return False

    def _decoded(self, drawn: Mapping[str, Any]) -> Point:
        """In the order of the space. A choice, whose values may be lists, is known to Optuna by its position."""
        ranges = {name: of for name, of in self._search.space.items() if name in drawn}
        return {name: of.values[drawn[name]] if of.kind == "choice" else drawn[name] for name, of in ranges.items()}


def _suggest_point(search: Search, drawn: Any) -> None:
    """Draws the fields that matter to the method, which is drawn first; `drawn` is an Optuna trial."""
    method = search.methods[0]
    if METHOD in search.space:
        method = search.space[METHOD].values[_suggest(drawn, METHOD, search.space[METHOD])]
    for name in search.fields_of(method):
        if name != METHOD:
            _suggest(drawn, name, search.space[name])


def _suggest(drawn: Any, name: str, of: Range) -> Any:
    if of.kind == "choice":
        return drawn.suggest_categorical(name, list(range(len(of.values))))
    if of.kind == "integer":
        return drawn.suggest_int(name, *of.values)
    return drawn.suggest_float(name, *map(float, of.values), log=of.kind == "loguniform")


def early_stopping(search: Search, base: Config) -> TrialScheduler:
    options, lengths = search.options, [training_config(VARIANTS[name].method, base).epochs for name in search.methods]
    searched = [of.values for name, of in search.space.items() if name.endswith("training.epochs")]
    longest: int = max([*lengths, *(value for values in searched for value in values if value)])
    fewest = min(options.grace_period, longest)
    if options.early_stopping == "asha":
        return ASHAScheduler(EPOCH, METRIC, "max", max_t=longest, grace_period=fewest)
    if options.early_stopping == "median":  # a trial that waits for the others to be measured would lose its place
        return MedianStoppingRule(EPOCH, METRIC, "max", grace_period=fewest, min_time_slice=cast(int, inf))
    return FIFOScheduler()


class Listener(tune.Callback):
    """Tells of each trial that began, measured something or ended; and of all, at the end.

    Ray Tune pickles it with the search: what it tells is this process's, and no part of it.
    """

    changed: ClassVar[Callable[[Trial], None]]
    trials: ClassVar[list[Trial]]

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        Listener.changed(_trial(trial, "running", {}))

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: Any
    ) -> None:
        Listener.changed(_trial(trial, "running", result))

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        Listener.changed(_ended(trial))

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        Listener.changed(_ended(trial))

    def on_experiment_end(self, trials: list[RayTrial], **info: Any) -> None:
        Listener.trials = sorted(map(_ended, trials), key=lambda trial: trial.number)


def _trial(trial: RayTrial, state: State, result: Mapping[str, Any], fault: str = "") -> Trial:
    return Trial(
        **trial.config["trial"],
        state=state,
        epochs=result.get(EPOCH, 0),
        validation_accuracy=result.get(METRIC, 0.0) if state != "failed" else 0.0,
        accuracy=result.get(ACCURACY, {}),
        trained_parameters=result.get(PARAMETERS, 0),
        fault=fault,
    )


def _ended(trial: RayTrial) -> Trial:
    result = trial.last_result
    if trial.status == RayTrial.ERROR:
        fault = "its worker died; Ray's logs say why"
        with suppress(OSError, IndexError):
            fault = Path(trial.error_file or "").read_text().strip().splitlines()[-1]
        return _trial(trial, "failed", result, fault)
    if FAULT in result:
        return _trial(trial, "failed", result, result[FAULT])
    return _trial(trial, "whole" if result.get(WHOLE) else "stopped", result)
