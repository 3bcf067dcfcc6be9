"""Aggregations of the tasks' gradients and losses, against explicit Jacobians and the plain loss of each."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from functools import partial
from typing import get_args

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from pipelines import REPOSITORY
from small_clip import CLASS_NAMES, small_towers
from small_methods import SMALL, build_method
from small_problem import CONFIG, TEMPLATE, small_problem
from torchjd import aggregation as torchjd

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.load import build_meta_towers
from pipeline.config import Config, TrainingConfig, parse_config
from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.methods.registry import METHODS, VARIANTS, with_sources
from pipeline.seeds import derive_seed
from pipeline.stages.plan import check_methods
from pipeline.stages.training_spec import HISTORY, step_metrics, track_history, write_history
from pipeline.training import aggregation
from pipeline.training.aggregation import TORCHJD, GradientAggregation, check_packages, make_aggregation
from pipeline.training.batches import TrainingSet
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.trainer import StepRecord, Trainer

TASKS = ("ink", "chalk", "neon")
WORDS = dict.fromkeys(TASKS, CLASS_NAMES)
AGGREGATIONS = [name for name in get_args(TrainingConfig.model_fields["aggregation"].annotation) if name != "sum"]
SET_PER_TASK = [name for name, method in METHODS.items() if method.trainable and not method.mixes_tasks]
TOLERANCE = dict(rtol=1e-9, atol=1e-9)
LEARNING_RATE = 0.05


@pytest.fixture(scope="module")
def problem():
    """Towers, class tokens, and training sets of three tasks, of which two conflict: the same images, other labels."""
    towers, _, _, sets = small_problem()
    neon = replace(sets[0], tasks=("neon",), labels=((sets[0].labels[0] + 1) % len(CLASS_NAMES),))
    return towers, class_tokens(towers.tokenizer, TEMPLATE, [CLASS_NAMES] * 3), [*sets, neon]


def new_trainer(problem, name, method="mmap", epochs=2, **options):
    towers, tokens, sets = problem
    config = CONFIG.model_copy(update={"aggregation": name, "warmup_epochs": 0, "learning_rate": LEARNING_RATE})
    return Trainer(towers, build_method(method, towers, WORDS), sets, tokens, config, epochs=epochs, seed=5, **options)


def task_loss(trainer, step, task):
    """Return the loss of one task in a step, by a forward pass of its own."""
    towers, adaptation = trainer.towers, trainer.method()
    task_set: TrainingSet = trainer.training_sets[task]
    pixels, (labels,) = task_set.batch(step, 3, towers.preprocessing, CONFIG.augmentation, 5)
    counts = [len(pixels) * (number == task) for number in range(len(TASKS))]
    x = adaptation.encode_image(towers, towers.normalize_pixels(pixels), counts)
    z = trainer.tokens.pool_names_to_classes(adaptation.encode_text(towers, trainer.tokens))[task]
    return F.cross_entropy(towers.logits(x, z), labels)


def explicit_jacobian(trainer, step):
    """Return the tasks' losses and gradients, task → parameter → gradient, by a backward pass for each task."""
    losses, rows = [], []
    for task in range(len(TASKS)):
        loss = task_loss(trainer, step, task)
        rows.append(torch.autograd.grad(loss, trainer.parameters, allow_unused=True, materialize_grads=True))
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), rows


def flat_rows(trainer, rows):
    """Return the gradients (T, P) of the shared parameters, which come first."""
    count = len(trainer.method.shared_parameters())
    return torch.stack([torch.cat([gradient.flatten() for gradient in row[:count]]) for row in rows])


def sgd(trainer):
    return torch.optim.SGD(trainer.parameters, lr=1.0, momentum=0.9, weight_decay=5e-4)


def apply_gradients(trainer, optimizer, lr, shared, rest):
    """Update by gradients of the shared parameters (P,), and of the others."""
    parameters = trainer.method.shared_parameters()
    parts = [
        part.view_as(parameter) for part, parameter in zip(shared.split([p.numel() for p in parameters]), parameters)
    ]
    for parameter, gradient in zip(trainer.parameters, [*parts, *rest], strict=True):
        parameter.grad = gradient.clone()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


@pytest.mark.parametrize("name", SET_PER_TASK)
def test_gradients_of_one_backward_pass_equal_those_of_a_pass_for_each_task(problem, name):
    trainer = new_trainer(problem, "sum", name)
    shared = trainer.method.shared_parameters()
    assert all(a is b for a, b in zip(trainer.parameters, shared))
    trainer.backward(step=0)
    gradients = trainer.method.task_gradients()
    _, rows = explicit_jacobian(trainer, 0)
    expected = flat_rows(trainer, rows)
    assert gradients.shape == expected.shape and expected.abs().amax(1).min() > 1e-6
    torch.testing.assert_close(gradients, expected, **TOLERANCE)
    torch.testing.assert_close(gradients.sum(0), torch.cat([p.grad.flatten() for p in shared]), **TOLERANCE)
    for number, parameter in enumerate(trainer.parameters[len(shared) :], len(shared)):
        for task, row in enumerate(rows):  # axis 0 is the task
            assert len(parameter) == len(TASKS) and row[number][task].abs().max() > 0
            assert all(row[number][column].abs().max() == 0 for column in range(len(TASKS)) if column != task)


REFERENCES = {
    "pcgrad": torchjd.PCGrad,
    "cagrad": partial(torchjd.CAGrad, c=0.5),
    "mgda": torchjd.MGDA,
    "upgrad": partial(torchjd.UPGrad, pref_vector=torch.ones(3, dtype=torch.float64)),
    "nash_mtl": partial(torchjd.NashMTL, n_tasks=3),
}


@pytest.mark.parametrize("method", SET_PER_TASK)
@pytest.mark.parametrize("name", TORCHJD)
def test_updates_equal_torchjds_on_explicit_jacobians(problem, name, method):
    fast, slow = (new_trainer(problem, kind, method) for kind in (name, "sum"))
    aggregator, optimizer, conflicts = REFERENCES[name](), sgd(slow), 0
    scale = 3 if name in ("cagrad", "mgda") else 1  # theirs have the scale of the mean
    tolerance = dict(rtol=1e-7, atol=1e-7) if name == "nash_mtl" else TOLERANCE  # where its solver stops
    for step in range(fast.num_steps):
        slow.method.load_state_dict(fast.method.state_dict())  # so that differences do not add up over steps
        record = fast.step()
        losses, rows = explicit_jacobian(slow, step)
        jacobian = flat_rows(slow, rows)
        conflicts += int((jacobian @ jacobian.T).min() < 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(5, "aggregation", str(step)))
            shared = scale * aggregator(jacobian)
        rest = [sum(parts) for parts in zip(*rows)][len(slow.method.shared_parameters()) :]
        apply_gradients(slow, optimizer, record.learning_rate, shared, rest)
        assert record.losses == pytest.approx(losses.tolist(), rel=1e-9)
        for ours, expected in zip(fast.parameters, slow.parameters):
            torch.testing.assert_close(ours, expected, **tolerance)
            torch.testing.assert_close(ours.grad, expected.grad, **tolerance)
    assert conflicts > 2


@pytest.mark.parametrize("method", SET_PER_TASK)
def test_uncertainty_equals_the_plain_loss_with_trained_log_variances(problem, method):
    fast, slow = (new_trainer(problem, kind, method) for kind in ("uncertainty", "sum"))
    log_variances = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([*slow.parameters, log_variances], lr=1.0, momentum=0.9, weight_decay=5e-4)
    for step in range(fast.num_steps):
        record = fast.step()
        assert record.weights == pytest.approx(log_variances.detach().neg().exp().tolist(), rel=1e-9)
        losses = torch.stack([task_loss(slow, step, task) for task in range(3)])
        optimizer.zero_grad()
        ((-log_variances).exp() * losses + log_variances / 2).sum().backward()
        optimizer.param_groups[0]["lr"] = record.learning_rate
        optimizer.step()
        for ours, expected in zip(fast.parameters, slow.parameters):
            torch.testing.assert_close(ours, expected, **TOLERANCE)
    assert log_variances.abs().min() > 0.01


@pytest.mark.parametrize("method", SET_PER_TASK)
def test_famo_equals_the_plain_loss_with_logits_by_the_change_of_log_losses(problem, method):
    """As the authors' code, except that the change of the losses is to first order."""
    fast, slow = (new_trainer(problem, kind, method) for kind in ("famo", "sum"))
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer, adam = sgd(slow), torch.optim.Adam([logits], lr=0.025, weight_decay=0.01)
    for step in range(fast.num_steps):
        record = fast.step()
        losses = torch.stack([task_loss(slow, step, task) for task in range(3)])
        z, shifted = logits.softmax(0).detach(), losses + 1e-8
        optimizer.zero_grad()
        (3 * (z * shifted.log()).sum() / (z / shifted).sum().detach()).backward()
        _, rows = explicit_jacobian(slow, step)
        initial = [parameter.detach().clone() for parameter in slow.parameters]
        optimizer.param_groups[0]["lr"] = record.learning_rate
        optimizer.step()
        change = [(parameter.detach() - start).flatten() for parameter, start in zip(slow.parameters, initial)]
        increase = torch.stack([sum(g.flatten() @ d for g, d in zip(row, change)) for row in rows])
        (logits.grad,) = torch.autograd.grad(logits.softmax(0), logits, -increase / shifted.detach())
        adam.step()
        torch.testing.assert_close(fast.aggregation.logits, logits.detach(), **TOLERANCE)
        for ours, expected in zip(fast.parameters, slow.parameters):
            torch.testing.assert_close(ours, expected, **TOLERANCE)
    assert logits.abs().min() > 0.001 and max(record.weights) / min(record.weights) > 1.1


def test_the_first_order_change_of_famos_losses_is_that_of_a_second_forward_pass(problem, monkeypatch):
    """For a small step, as the authors take it."""
    monkeypatch.setattr("test_aggregation.LEARNING_RATE", 1e-5)
    trainer = new_trainer(problem, "famo")
    initial = torch.stack([task_loss(trainer, 0, task) for task in range(3)]).detach().log()
    trainer.step()
    decreases = initial - torch.stack([task_loss(trainer, 0, task) for task in range(3)]).detach().log()
    shares = torch.full((3,), 1 / 3, dtype=torch.float64)
    expected = shares * (decreases - shares @ decreases)
    torch.testing.assert_close(trainer.aggregation.logits.grad, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", TORCHJD)
def test_tasks_that_agree_are_updated_as_by_the_sum(problem, name):
    """So that the learning rate of the sum suits all. CAGrad adds half (c = 0.5); Nash-MTL limits the norm to one."""
    rows = torch.full((3, 50), 0.02, dtype=torch.float64)
    aggregator = make_aggregation(name, new_trainer(problem, "sum").method, 3, seed=1)
    total = {"cagrad": 4.5}.get(name, 3)
    assert aggregator.weights(0, torch.ones(3), rows).sum().item() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_weighed_training_resumes_identically_from_any_step(problem, name, tmp_path):
    uninterrupted = new_trainer(problem, name, snapshot_every=3)
    states = [copy.deepcopy(uninterrupted.state_dict())]
    for _ in range(uninterrupted.num_steps):
        uninterrupted.step()
        states.append(copy.deepcopy(uninterrupted.state_dict()))
    for step, state in enumerate(states):
        Checkpoints(tmp_path).save(state)
        resumed = new_trainer(problem, name, snapshot_every=3, checkpoints=Checkpoints(tmp_path))
        assert len(resumed.history) == step
        torch.manual_seed(step)  # it has no say in PCGrad's orders
        while len(resumed.history) < resumed.num_steps:
            resumed.step()
        torch.testing.assert_close(resumed.state_dict(), states[-1], rtol=0, atol=0)
    assert all(len(record.weights) == 3 for record in resumed.history)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_single_task_is_trained_as_by_the_sum(problem, name):
    towers, _, sets = problem
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_NAMES])
    states = []
    for kind in (name, "sum"):
        method = build_method("mmap", towers, {"ink": CLASS_NAMES})
        trainer = Trainer(
            towers, method, sets[:1], tokens, CONFIG.model_copy(update={"aggregation": kind}), epochs=1, seed=5
        )
        trainer.train()
        states.append(trainer.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_no_weights_of_the_tasks_is_an_error_with_the_step_and_the_norms(problem):
    method = new_trainer(problem, "sum").method
    rows = torch.full((3, 50), torch.nan, dtype=torch.float64)
    for name in ("cagrad", "mgda", "upgrad"):
        with pytest.raises(UserError, match=f"aggregation={name} found no weights.*step 8.*norms nan.*sum"):
            GradientAggregation(name, method, 3, seed=1).weights(7, torch.ones(3), rows)


@pytest.mark.parametrize("name, missing", [("upgrad", "quadprog"), ("cagrad", "cvxpy"), ("pcgrad", "torchjd")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, name, missing):
    check_packages(name)
    find_spec = aggregation.find_spec
    monkeypatch.setattr(aggregation, "find_spec", lambda package: None if package == missing else find_spec(package))
    with pytest.raises(UserError, match=rf"aggregation={name} needs {missing}, which is not installed.*\n.*\[aggrega"):
        check_packages(name)
    for weighing in ("sum", "famo", "uncertainty"):
        check_packages(weighing)


def test_weights_are_in_the_history_and_logged(tmp_path):
    class Session:
        tracker = property(lambda self: self)

        def log_metric_history(self, name, items):
            self.logged = {step: metrics for step, metrics in items}

        def download(self):
            return tmp_path

    records = [StepRecord(step, 1, 0.1, (0.5, 0.25), (1.0, 0.0), (step / 4, 2.0)) for step in (1, 2)]
    write_history(tmp_path / HISTORY, TASKS[:2], records)
    assert pq.read_table(tmp_path / HISTORY)["weight"].to_pylist() == [0.25, 2.0, 0.5, 2.0]
    session = Session()
    track_history(session, "name", session)
    assert session.logged == {record.step: step_metrics(TASKS[:2], record) for record in records}
    assert session.logged[2]["task_weight/ink"] == 0.5

    write_history(tmp_path / HISTORY, TASKS[:2], [replace(record, weights=None) for record in records])
    assert "weight" not in pq.read_table(tmp_path / HISTORY).column_names
    track_history(session, "name", session)
    assert session.logged[2].keys() == {
        "learning_rate",
        *(f"train_{m}/{t}" for m in ("loss", "accuracy") for t in TASKS[:2]),
    }


def test_aggregations_are_those_of_the_config():
    method = METHODS["mmap"].build(Config(), small_towers()[0], WORDS)
    assert {type(make_aggregation(name, method, 3, 1)).__name__ for name in AGGREGATIONS} == {
        "GradientAggregation",
        "Uncertainty",
        "Famo",
    }
    assert set(TORCHJD) < set(AGGREGATIONS)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_methods_with_mixed_batches_are_refused_with_a_remedy_that_works(name):
    """Their single-task variants have nothing to weigh."""
    index = DatasetIndex(REPOSITORY, "folders", (), {"ink": ("cat", "dog")}, {"cat": "cat", "dog": "dog"}, (), ())
    config = SMALL.model_copy(update={"training": TrainingConfig(aggregation=name, batch_size=4)})
    towers, refused = build_meta_towers(config.clip), set()
    for variant in VARIANTS:
        try:
            check_methods(config, index, towers, [variant])
        except UserError as error:
            refused.add(variant)
            assert f"aggregation={name} weighs tasks" in str(error) and f"leave out {variant}" in str(error)
            section, value = re.search(r"--(\w+)\.training\.aggregation (\w+)", str(error)).groups()
            values = json.loads(config.model_dump_json())
            values[section]["training"]["aggregation"] = value
            check_methods(parse_config(values), index, towers, [variant])
    mixing = {
        name
        for name, variant in VARIANTS.items()
        if METHODS[variant.method].takes_steps
        and METHODS[variant.method].mixes_tasks
        and variant.scope != "single-task"
    }
    assert refused == {name for name in VARIANTS if mixing & {*with_sources([name])}} > {"wise_ft_mt"}
