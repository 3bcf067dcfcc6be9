"""Ray Tune's parts of a search: Optuna, early stopping, and the callback that reports trials."""

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
from pipeline.tuning.points import MAX_REJECTED_SAMPLES, Check, TrialParams, sample_points
from pipeline.tuning.search_file import METHOD, Range, Search
from pipeline.tuning.trials import State, Trial
from pipeline.workflows.tuning_trial import ACCURACY, COMPLETED, EPOCH, ERROR, METRIC, PARAMETERS

set_verbosity(WARNING)
MAX_OPTUNA_SAMPLES = 100
"""Per trial, before it is sampled at random: in a small space Optuna suggests the best point again and again."""


class UniqueOptunaSearch(OptunaSearch):
    """Optuna's TPE without repeated or invalid trials. Ray Tune pickles it with the search."""

    def __init__(self, search: Search, check: Check):
        self._search, self._check = search, check
        self._suggested: set[str] = set()
        self._optuna_ids: dict[str, str] = {}
        """Trial → its id in Optuna, which repeats its suggestion for a known id."""
        sampler = TPESampler(seed=search.options.seed, constant_liar=True)
        super().__init__(partial(_suggest_params, search), METRIC, "max", sampler=sampler)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return {"trial": {"number", "params"}}, or FINISHED if the space is exhausted."""
        for attempt in range(MAX_OPTUNA_SAMPLES):
            optuna_id = f"{trial_id} {attempt}"
            params = self._decode(super().suggest(optuna_id) or {})
            repeated = json.dumps(params) in self._suggested
            if not repeated and self._is_valid(params):
                self._optuna_ids[trial_id] = optuna_id
                return self._start(params)
            # Invalid params are pruned, which Optuna counts as bad; repeated ones are errors, which it ignores.
            super().on_trial_complete(optuna_id, error=repeated)
        candidates = sample_points(self._search.space, self._search.options.seed + len(self._suggested))
        for point in islice(candidates, MAX_REJECTED_SAMPLES):
            params = self._search.trial_params(point)
            if json.dumps(params) not in self._suggested and self._is_valid(params):
                return self._start(params)
        return cast(dict[str, Any], self.FINISHED)  # a string, contrary to Ray's types

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass  # TPE uses final results only

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if optuna_id := self._optuna_ids.get(trial_id):  # absent if sampled at random
            super().on_trial_complete(optuna_id, result, error)

    def _start(self, params: TrialParams) -> dict[str, Any]:
        self._suggested.add(json.dumps(params))
        return {"trial": {"number": len(self._suggested) - 1, "params": params}}

    def _is_valid(self, params: TrialParams) -> bool:
        try:
            self._check(params)
            return True
        except UserError:
            return False

    def _decode(self, suggestion: Mapping[str, Any]) -> TrialParams:
        """Return params in the order of the space, with the values of choices, which Optuna knows by their indices."""
        ranges = {name: entry for name, entry in self._search.space.items() if name in suggestion}
        return {
            name: entry.values[suggestion[name]] if entry.kind == "choice" else suggestion[name]
            for name, entry in ranges.items()
        }


def _suggest_params(search: Search, optuna_trial: Any) -> None:
    """Suggest the method, then the fields that affect it."""
    method = search.methods[0]
    if METHOD in search.space:
        method = search.space[METHOD].values[_suggest(optuna_trial, METHOD, search.space[METHOD])]
    for name in search.fields_for(method):
        if name != METHOD:
            _suggest(optuna_trial, name, search.space[name])


def _suggest(optuna_trial: Any, name: str, value_range: Range) -> Any:
    if value_range.kind == "choice":
        return optuna_trial.suggest_categorical(name, list(range(len(value_range.values))))
    if value_range.kind == "integer":
        return optuna_trial.suggest_int(name, *value_range.values)
    return optuna_trial.suggest_float(name, *map(float, value_range.values), log=value_range.kind == "loguniform")


def early_stopping(search: Search, base: Config) -> TrialScheduler:
    options, epochs = (
        search.options,
        [training_config(VARIANTS[method].method, base).epochs for method in search.methods],
    )
    searched = [entry.values for name, entry in search.space.items() if name.endswith("training.epochs")]
    max_epochs: int = max([1, *epochs, *(value for values in searched for value in values if value)])
    grace_period = min(options.grace_period, max_epochs)
    if options.early_stopping == "asha":
        return ASHAScheduler(EPOCH, METRIC, "max", max_t=max_epochs, grace_period=grace_period)
    if options.early_stopping == "median":  # no time slices: a trial paused to wait for the others would lose its slot
        return MedianStoppingRule(EPOCH, METRIC, "max", grace_period=grace_period, min_time_slice=cast(int, inf))
    return FIFOScheduler()


class TrialListener(tune.Callback):
    """Reports each trial when it starts, is measured or ends, and collects all trials at the end.

    Ray Tune pickles it with the search, so its state belongs to the class, which is not pickled.
    """

    on_change: ClassVar[Callable[[Trial], None]]
    trials: ClassVar[list[Trial]]

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        TrialListener.on_change(_to_trial(trial, "running", {}))

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: Any
    ) -> None:
        TrialListener.on_change(_to_trial(trial, "running", result))

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        TrialListener.on_change(_ended_trial(trial))

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        TrialListener.on_change(_ended_trial(trial))

    def on_experiment_end(self, trials: list[RayTrial], **info: Any) -> None:
        TrialListener.trials = sorted(map(_ended_trial, trials), key=lambda trial: trial.number)


def _to_trial(trial: RayTrial, state: State, result: Mapping[str, Any], error: str = "") -> Trial:
    return Trial(
        **trial.config["trial"],
        state=state,
        epochs=result.get(EPOCH, 0),
        validation_accuracy=result.get(METRIC, 0.0) if state != "failed" else 0.0,
        accuracy=result.get(ACCURACY, {}),
        trained_parameters=result.get(PARAMETERS, 0),
        error=error,
    )


def _ended_trial(trial: RayTrial) -> Trial:
    result = trial.last_result
    if trial.status == RayTrial.ERROR:
        error = "its worker died: see Ray's logs"
        with suppress(OSError, IndexError):
            error = Path(trial.error_file or "").read_text().strip().splitlines()[-1]
        return _to_trial(trial, "failed", result, error)
    if ERROR in result:
        return _to_trial(trial, "failed", result, result[ERROR])
    return _to_trial(trial, "completed" if result.get(COMPLETED) else "pruned", result)
