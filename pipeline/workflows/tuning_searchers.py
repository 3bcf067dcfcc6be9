"""Ray Tune's parts of a search: Optuna, early stopping, and the callback that records what trials report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.logging import WARNING, set_verbosity
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from pipeline.errors import UserError
from pipeline.tuning.points import DRAWS_FOR_A_POINT, Check, Point, draws
from pipeline.tuning.search_file import METHOD, Range, Search
from pipeline.tuning.trials import Epoch, Trial, TrialRecords
from pipeline.workflows.tuning_trial import ACCURACY, EPOCH, FAULT, METRIC, PARAMETERS

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial as RayTrial

set_verbosity(WARNING)
DRAWS_OF_OPTUNA = 100
"""For one point, until it is drawn at random: in a small space Optuna asks for the best point again and again."""


class OptunaPoints(OptunaSearch):
    """Optuna's TPE, which takes up the trials of before, and tries no point twice and none that cannot be."""

    def __init__(self, search: Search, check: Check, before: Sequence[Trial]):
        self._search, self._check = search, check
        sampler = TPESampler(seed=(search.options.seed + len(before)) % 2**32, constant_liar=True)
        super().__init__(space=self._point_of, metric=METRIC, mode="max", sampler=sampler)
        self._tried = {json.dumps(trial.point) for trial in before}
        self._unfinished = [trial for trial in before if trial.state == "running"]
        self._next_number = max((trial.number + 1 for trial in before), default=0)
        for trial in before:
            if trial.state != "running":
                params = self._encoded(trial.point)
                distributions = {name: _distribution(self._search.space[name]) for name in params}
                value = trial.validation_accuracy
                self._study.add_trial(create_trial(params=params, distributions=distributions, value=value))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """{"trial": {"number", "point"}}; FINISHED when the space has no more points."""
        if self._unfinished:
            trial = self._unfinished.pop(0)
            self._ask(trial_id, trial.point)
            return {"trial": {"number": trial.number, "point": trial.point}}
        for _ in range(DRAWS_OF_OPTUNA):
            drawn = super().suggest(trial_id)
            assert drawn is not None
            point = self._decoded(drawn)
            if self._is_new(point):
                return self._begun(point)
            self._drop(trial_id, point)
        candidates = draws(self._search.space, self._search.options.seed + self._next_number)
        for _, values in zip(range(DRAWS_FOR_A_POINT), candidates):
            point = self._search.point(values)
            if self._is_new(point):
                self._ask(trial_id, point)
                return self._begun(point)
        return cast(dict[str, Any], Searcher.FINISHED)  # a string, which Ray's types do not tell

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # what a search goes on from is in its records

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its parts for a resumption that is not used here

    @property
    def _study(self) -> Study:
        """Optuna's own, which Ray makes when it is given a space."""
        return cast(Study, self._ot_study)

    def _begun(self, point: Point) -> dict[str, Any]:
        self._tried.add(json.dumps(point))
        self._next_number += 1
        return {"trial": {"number": self._next_number - 1, "point": point}}

    def _ask(self, trial_id: str, point: Point) -> None:
        self._study.enqueue_trial(self._encoded(point))
        super().suggest(trial_id)

    def _is_new(self, point: Point) -> bool:
        return json.dumps(point) not in self._tried and self._can_be(point)

    def _can_be(self, point: Point) -> bool:
        try:
            self._check(point)
            return True
        except UserError:
            return False

    def _drop(self, trial_id: str, point: Point) -> None:
        """What cannot be counts as bad; what was tried before says nothing new."""
        state = TrialState.PRUNED if not self._can_be(point) else TrialState.FAIL
        self._study.tell(self._ot_trials.pop(trial_id), state=state)

    def _point_of(self, drawn: Any) -> None:
        """Draws the fields that matter to the method, which is drawn first; `drawn` as an Optuna trial."""
        space, method = self._search.space, self._search.methods[0]
        if METHOD in space:
            method = space[METHOD].values[_draw(drawn, METHOD, space[METHOD])]
        for name in self._search.fields_of(method):
            if name != METHOD:
                _draw(drawn, name, space[name])

    def _encoded(self, point: Point) -> dict[str, Any]:
        """A choice, whose values may be lists, is known to Optuna by its position."""
        ranges = {name: self._search.space[name] for name in point}
        return {
            name: of.values.index(point[name]) if of.kind == "choice" else point[name] for name, of in ranges.items()
        }

    def _decoded(self, drawn: Mapping[str, Any]) -> Point:
        """In the order of the space."""
        ranges = {name: of for name, of in self._search.space.items() if name in drawn}
        return {name: of.values[drawn[name]] if of.kind == "choice" else drawn[name] for name, of in ranges.items()}


def _draw(drawn: Any, name: str, of: Range) -> Any:
    if of.kind == "choice":
        return drawn.suggest_categorical(name, list(range(len(of.values))))
    if of.kind == "integer":
        return drawn.suggest_int(name, *of.values)
    return drawn.suggest_float(name, *map(float, of.values), log=of.kind == "loguniform")


def _distribution(of: Range) -> BaseDistribution:
    if of.kind == "choice":
        return CategoricalDistribution(list(range(len(of.values))))
    if of.kind == "integer":
        return IntDistribution(*of.values)
    low, high = map(float, of.values)
    return FloatDistribution(low, high, log=of.kind == "loguniform")


class _OfBefore:
    """Stands for a trial that ended before this process began."""

    def __init__(self, number: int):
        self.trial_id = f"before-{number}"


def early_stopping(search: Search, most_epochs: int, before: Sequence[Trial]) -> TrialScheduler:
    """The rule, which knows what the trials of before measured."""
    options = search.options
    fewest = min(options.fewest_epochs, most_epochs)
    if options.early_stopping == "none":
        return FIFOScheduler()
    rule: TrialScheduler
    if options.early_stopping == "asha":
        rule = ASHAScheduler(EPOCH, METRIC, "max", max_t=most_epochs, grace_period=fewest)
    else:  # a trial that waits for the others to be measured would lose its place
        forever = cast(int, inf)
        rule = MedianStoppingRule(EPOCH, METRIC, "max", grace_period=fewest, min_time_slice=forever)
    for trial in before:
        if trial.state in ("whole", "stopped"):
            # These rules look at a trial's id alone, and not at the controller.
            nobody, stand_in = cast("TuneController", None), cast("RayTrial", _OfBefore(trial.number))
            rule.on_trial_add(nobody, stand_in)
            for of in trial.epochs[:-1]:
                rule.on_trial_result(nobody, stand_in, {EPOCH: of.epoch, METRIC: of.average})
            last = trial.epochs[-1]
            rule.on_trial_complete(nobody, stand_in, {EPOCH: last.epoch, METRIC: last.average})
    return rule


class Recorder(tune.Callback):
    """Keeps the trials' records up to date, and tells of each change."""

    def __init__(
        self,
        records: TrialRecords,
        epochs_of: Callable[[Point], int],
        before: Sequence[Trial],
        changed: Callable[[Trial], None],
    ):
        """
        Args:
            epochs_of: how long a point's trainings are.
            before: trials of which some go on.
            changed: told of each trial that began, measured something or ended.
        """
        self._records, self._epochs_of, self._changed = records, epochs_of, changed
        self._before = {trial.number: trial for trial in before}
        self._trials: dict[str, Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as of OptunaPoints

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.trial_id not in self._trials:  # else its worker died, and it goes on
            number, point = trial.config["trial"]["number"], trial.config["trial"]["point"]
            self._keep(trial, self._before.get(number) or Trial(number, point))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        known = self._trials[trial.trial_id]
        if FAULT in result:
            self._trials[trial.trial_id] = replace(known, fault=result[FAULT])
        elif not known.epochs or result[EPOCH] > known.epochs[-1].epoch:
            epoch = Epoch(result[EPOCH], result[METRIC], result[ACCURACY])
            self._keep(trial, replace(known, epochs=(*known.epochs, epoch), trained_parameters=result[PARAMETERS]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        known = self._trials[trial.trial_id]
        whole = known.epochs and known.epochs[-1].epoch == self._epochs_of(known.point)
        self._keep(trial, replace(known, state="failed" if known.fault else "whole" if whole else "stopped"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        fault = "its worker died; Ray's logs say why"
        with suppress(OSError, IndexError):
            fault = Path(trial.error_file or "").read_text().strip().splitlines()[-1]
        self._keep(trial, replace(self._trials[trial.trial_id], state="failed", fault=fault))

    def _keep(self, trial: Any, known: Trial) -> None:
        self._trials[trial.trial_id] = known
        self._records.write(known)
        self._changed(known)
