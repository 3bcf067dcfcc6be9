"""The trainer, its schedule, batches and checkpoints; evaluation; adapter files."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import get_args

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from pipelines import REPOSITORY
from reference_towers import reference_encode_image, reference_encode_text
from small_clip import CLASS_NAMES, small_towers, tokenizer
from small_problem import (
    CONFIG,
    TASKS,
    TEMPLATE,
    TEST_COUNTS,
    group_prompts,
    mmap_shape,
    prompted_classifier,
    small_problem,
    write_test_splits,
)

from pipeline.clip.class_tokens import class_tokens
from pipeline.config import AugmentationConfig, TrainingConfig
from pipeline.data import parquet
from pipeline.data.decoding_pool import MAX_THREADS, MIN_IMAGES, decoding_pool
from pipeline.data.images import evaluation_pixels
from pipeline.data.parquet import SplitReader
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.classifier import Classifier
from pipeline.methods.mmap import SharedMmap
from pipeline.training import evaluate as evaluation
from pipeline.training import frozen_features
from pipeline.training.batches import TrainingSet, batch_indices
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.evaluate import (
    PREFETCH_BATCHES,
    accuracy,
    decoded_batches,
    evaluate,
    evaluate_decoded,
    evaluate_features,
    mean_loss,
)
from pipeline.training.frozen_features import frozen_split_features, frozen_training_features
from pipeline.training.optimizers import OPTIMIZERS
from pipeline.training.snapshots import read_gradients, read_trajectory, write_snapshots, write_trajectory
from pipeline.training.trainer import Snapshot, StepRecord, Trainer, learning_rate


@pytest.fixture(scope="module")
def problem():
    return small_problem()


def test_learning_rates_are_dassls():
    config = TrainingConfig()  # 0.0035, one warm-up epoch at 1e-5, 5 epochs
    learning_rates = [learning_rate(3 * epoch, 3, 5, config) for epoch in range(5)]
    assert [learning_rate(step, 3, 5, config) for step in range(15)] == [lr for lr in learning_rates for _ in range(3)]
    assert learning_rates == pytest.approx([1e-5, 0.0035, 0.00317, 0.00229, 0.00121], abs=5e-6)

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0035)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    for epoch in range(1, 5):
        assert learning_rates[epoch] == pytest.approx(cosine.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        cosine.step()


def test_learning_rates_per_step_are_torchs():
    """CLIP-LoRA's: no warm-up, and a cosine to a minimum."""
    config = TrainingConfig(warmup_epochs=0, learning_rate=2e-4, min_learning_rate=1e-6, schedule_interval="step")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15, eta_min=1e-6)
    for step in range(15):
        assert learning_rate(step, 3, 5, config) == pytest.approx(cosine.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        cosine.step()
    warm = config.model_copy(update={"warmup_epochs": 1})
    assert [learning_rate(step, 3, 5, warm) for step in range(3)] == [1e-5] * 3
    for step in range(3, 15):
        assert learning_rate(step, 3, 5, warm) == pytest.approx(learning_rate(step - 3, 3, 5, config), rel=1e-12)


def test_batches_show_each_image_equally_often():
    stream = [i for step in range(10) for i in batch_indices(7, 4, step, seed=3)]  # 40 = 5 passes and 5 more
    for start in range(0, 35, 7):
        assert sorted(stream[start : start + 7]) == list(range(7))
    assert stream[:7] != stream[7:14]
    assert batch_indices(7, 4, 5, seed=3) == stream[20:24]
    assert batch_indices(7, 4, 5, seed=4) != stream[20:24]
    assert len(batch_indices(2, 5, 0, seed=1)) == 5


def numbered_set(task, numbers):
    """A set whose images are known by their labels."""
    labels = torch.tensor(numbers, dtype=torch.int64)
    return TrainingSet(
        (task,), tuple(torch.full((3, 4, 4), number, dtype=torch.uint8) for number in numbers), (labels,)
    )


def mixed_batch(training_set, step, batch_size, seed=3):
    """Return a batch's labels by task; they are those of its images."""
    pixels, labels = training_set.batch(step, batch_size, Preprocessing(4), AugmentationConfig(flip=False), seed)
    assert pixels[:, 0, 0, 0].round().tolist() == torch.cat(labels).tolist()
    return [task_labels.tolist() for task_labels in labels]


def test_mixed_batches_show_each_image_equally_often():
    by_task = {"ink": range(10), "chalk": range(20, 25), "neon": [], "noise": range(30, 37)}
    mixed = TrainingSet.union([numbered_set(task, list(numbers)) for task, numbers in by_task.items()])
    assert (mixed.tasks, len(mixed)) == (tuple(by_task), 22)
    passes, counts = [], set()
    for start in range(0, 8, 2):  # of 11 images
        batches = [mixed_batch(mixed, step, 11) for step in (start, start + 1)]
        for task, numbers in enumerate(by_task.values()):
            assert sorted(batches[0][task] + batches[1][task]) == list(numbers)
        counts |= {tuple(map(len, batch)) for batch in batches}
        passes.append(batches)
    assert len(counts) > 2 and len({str(batches) for batches in passes}) == 4
    assert mixed_batch(mixed, 4, 11) == passes[2][0] != mixed_batch(mixed, 4, 11, seed=4)
    assert any([] == batch[1] for batch in (mixed_batch(mixed, step, 2) for step in range(11)))


def test_a_union_of_one_task_has_its_batches(problem):
    _, _, _, (ink, _) = problem
    for step in range(5):
        options = step, 3, Preprocessing(16), CONFIG.augmentation, 5
        (pixels, labels), expected = TrainingSet.union([ink]).batch(*options), ink.batch(*options)
        assert torch.equal(pixels, expected[0]) and torch.equal(*labels, *expected[1])


@pytest.mark.parametrize("momentum, weight_decay", [(0.9, 5e-4), (0.6, 0.02)])
def test_the_trainer_equals_sgd_on_the_summed_losses(problem, momentum, weight_decay):
    """Compare with a slow reference: one task after the other, prompts concatenated at every layer, torch's SGD."""
    towers, model, tokens, sets = problem
    fast = group_prompts(towers)
    config = CONFIG.model_copy(update={"momentum": momentum, "weight_decay": weight_decay})
    history = Trainer(towers, fast, sets, tokens, config, epochs=2, seed=5).train()
    assert [record.step for record in history] == list(range(1, 9))  # ceil(10 / 3) steps an epoch
    assert [record.epoch for record in history] == [1] * 4 + [2] * 4

    slow = group_prompts(towers)
    optimizer = torch.optim.SGD(slow.parameters(), lr=1.0, momentum=momentum, weight_decay=weight_decay)
    ids = tokenizer()([TEMPLATE.format(name) for name in CLASS_NAMES])
    for step, record in enumerate(history):
        optimizer.param_groups[0]["lr"] = 1e-3 if step < 4 else 0.05
        losses = []
        for t, task_set in enumerate(sets):
            adaptation = slow()
            pixels, (labels,) = task_set.batch(step, 3, towers.preprocessing, CONFIG.augmentation, 5)
            x = reference_encode_image(model, towers.normalize_pixels(pixels), adaptation.vision_prompts[t])
            z = reference_encode_text(model, ids, adaptation.text_prompts[t])
            losses.append(F.cross_entropy(towers.logits(x, z), labels))
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        assert record.losses == pytest.approx([loss.item() for loss in losses], rel=1e-9)
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[name], rtol=1e-9, atol=1e-9)


def test_all_prompts_train_and_no_frozen_weight(problem):
    towers, _, tokens, sets = problem
    frozen = {name: value.clone() for name, value in towers.state_dict().items()}
    prompts = group_prompts(towers)
    untrained = {name: value.clone() for name, value in prompts.state_dict().items()}
    Trainer(towers, prompts, sets, tokens, CONFIG, epochs=1, seed=1).train()
    assert all(torch.equal(value, frozen[name]) for name, value in towers.state_dict().items())
    assert all((value != untrained[name]).all() for name, value in prompts.state_dict().items())


def test_bfloat16_autocast_keeps_prompts_in_full_precision(problem):
    _, _, tokens, sets = problem
    towers, _ = small_towers(dtype=torch.float32)
    losses = {}
    for precision in ("float32", "bfloat16"):
        prompts = group_prompts(towers).float()
        history = Trainer(towers, prompts, sets, tokens, CONFIG, epochs=2, seed=5, precision=precision).train()
        losses[precision] = torch.tensor([record.losses for record in history])
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in prompts.parameters())
    assert not torch.equal(losses["float32"], losses["bfloat16"])
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("custom_text", [False, True])
def test_matrices_cast_to_bfloat16_equal_autocast(problem, custom_text):
    """Bit-identical results, with half the memory."""
    _, _, tokens, sets = problem
    states = []
    for cast in (False, True):
        towers, _ = small_towers(dtype=torch.float32, custom_text=custom_text)
        float32_bytes = sum(p.numel() * p.element_size() for p in towers.visual.transformer.parameters())
        if cast:
            towers.cast_weights_to_bfloat16()
            assert (
                sum(p.numel() * p.element_size() for p in towers.visual.transformer.parameters()) < 0.6 * float32_bytes
            )
        prompts = group_prompts(towers).float()
        history = Trainer(towers, prompts, sets, tokens, CONFIG, epochs=1, seed=5, precision="bfloat16").train()
        states.append((prompts.state_dict(), [record.losses for record in history]))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_at, optimizer", [(2, "sgd"), (4, "sgd"), (9, "sgd"), (15, "sgd"), (9, "adamw")])
def test_an_interrupted_training_ends_with_identical_results(problem, tmp_path, stop_at, optimizer):
    towers, _, tokens, sets = problem
    config = CONFIG.model_copy(update={"optimizer": optimizer})

    def run(folder, on_step=lambda record, num_steps: None):
        shape = mmap_shape(towers)
        prompts = SharedMmap(shape, TASKS, seed=1, init_std=0.3).double()
        trainer = Trainer(
            towers,
            prompts,
            sets,
            tokens,
            config,
            epochs=4,
            seed=5,
            checkpoints=folder and Checkpoints(folder),
            on_step=on_step,
            snapshot_every=3,
        )
        return prompts.state_dict(), trainer.train(), trainer.snapshots

    def stop(record, num_steps):
        assert num_steps == 16
        if record.step == stop_at:
            raise Interrupted

    uninterrupted = run(None)
    with pytest.raises(Interrupted):
        run(tmp_path, stop)
    new_steps = []
    resumed = run(tmp_path, lambda record, num_steps: new_steps.append(record.step))
    assert new_steps == list(range(4 * (stop_at // 4) + 1, 17))  # from the last complete epoch
    assert resumed[1] == uninterrupted[1]
    assert all(torch.equal(value, uninterrupted[0][name]) for name, value in resumed[0].items())
    assert [snapshot.record.step for snapshot in resumed[2]] == [1, 4, 7, 10, 13, 16]
    for ours, expected in zip(resumed[2], uninterrupted[2]):
        assert torch.equal(ours.gradients, expected.gradients) and torch.equal(ours.parameters, expected.parameters)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_resumes_identically_from_any_step(problem, optimizer):
    towers, _, tokens, sets = problem
    config = CONFIG.model_copy(update={"optimizer": optimizer})

    def new_trainer() -> Trainer:
        prompts = SharedMmap(mmap_shape(towers), TASKS, seed=1, init_std=0.3).double()
        return Trainer(towers, prompts, sets, tokens, config, epochs=2, seed=5, snapshot_every=3)

    uninterrupted = new_trainer()
    states = [copy.deepcopy(uninterrupted.state_dict())]
    for _ in range(uninterrupted.num_steps):
        uninterrupted.step()
        states.append(copy.deepcopy(uninterrupted.state_dict()))
    for step, state in enumerate(states):
        resumed = new_trainer()
        resumed.load_state_dict(state)
        assert (len(resumed.history), resumed.epoch) == (step, step // 4)
        resumed.train()
        assert resumed.epoch == 2
        torch.testing.assert_close(resumed.state_dict(), states[-1], rtol=0, atol=0)


def test_optimizers_are_those_of_the_config():
    assert tuple(OPTIMIZERS) == get_args(TrainingConfig.model_fields["optimizer"].annotation)
    config = TrainingConfig(learning_rate=0.5, momentum=0.75, weight_decay=0.25)
    references = {
        "sgd": partial(torch.optim.SGD, lr=0.5, momentum=0.75, weight_decay=0.25),
        "adamw": partial(torch.optim.AdamW, lr=0.5, weight_decay=0.25),
    }
    for name, reference in references.items():
        ours, expected = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
        optimizers = [OPTIMIZERS[name]([ours], config), reference([expected])]
        assert isinstance(optimizers[0], type(optimizers[1]))
        for _ in range(3):
            for parameter, optimizer in zip((ours, expected), optimizers):
                optimizer.zero_grad()
                (parameter**3).sum().backward()
                optimizer.step()
        assert torch.equal(ours, expected) and ours.requires_grad and ours.is_leaf


def change_a_number(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda content: content[:5000], lambda content: b"", change_a_number])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, caplog, damage):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    checkpoints.save({"step": 1})
    checkpoints.save({"step": 2, "data": torch.arange(10_000)})
    assert checkpoints.load()["step"] == 2
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert checkpoints.load()["step"] == 1
    assert "using the previous one" in caplog.text
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"also")
    assert checkpoints.load() is None


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path, monkeypatch):
    Checkpoints(tmp_path).save({"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"checkpoint\.pt.*No space left"):
        Checkpoints(tmp_path).save({"step": 2})
    assert Checkpoints(tmp_path).load() == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_loss_that_is_not_finite_stops_with_task_and_step(problem):
    towers, _, tokens, sets = problem
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "warmup_epochs": 0})
    with pytest.raises(UserError, match=r"loss of task 'ink' is (nan|inf) at step \d+.*learning_rate 1e\+30"):
        Trainer(towers, group_prompts(towers), sets, tokens, config, epochs=4, seed=1).train()


def test_a_loss_that_is_not_finite_is_reported_for_any_task(problem):
    towers, _, tokens, sets = problem
    for number, task in enumerate(TASKS):
        prompts = group_prompts(towers)
        with torch.no_grad():
            prompts.task.source[number] = torch.nan  # the other task's prompts are as they were
        with pytest.raises(UserError, match=f"loss of task '{task}' is nan at step 1: lower the learning_rate"):
            Trainer(towers, prompts, sets, tokens, CONFIG, epochs=1, seed=1).train()


@pytest.mark.parametrize("checkpoint_every, epochs_saved", [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (5, []), (9, [])])
def test_a_checkpoint_is_saved_every_few_epochs_but_not_at_the_end(problem, tmp_path, checkpoint_every, epochs_saved):
    """At the end the artifact itself is written."""
    towers, _, tokens, sets = problem
    saved = []

    class Recorded(Checkpoints):
        def save(self, state):
            saved.append(len(state["history"]) / 4)  # steps an epoch
            super().save(state)

    config = CONFIG.model_copy(update={"checkpoint_every": checkpoint_every})
    prompts = group_prompts(towers)
    history = Trainer(towers, prompts, sets, tokens, config, epochs=5, seed=1, checkpoints=Recorded(tmp_path)).train()
    assert saved == epochs_saved and len(history) == 20
    newest = Checkpoints(tmp_path).load()
    assert (len(newest["history"]) / 4 if newest else None) == (epochs_saved[-1] if epochs_saved else None)


@pytest.mark.parametrize("cause", ["a failed allocation", "another error"])
def test_out_of_memory_says_what_to_change(problem, monkeypatch, cause):
    towers, _, tokens, sets = problem
    size = 2**55 if cause == "a failed allocation" else -1
    monkeypatch.setattr(towers, "encode_image", lambda *arguments: torch.empty(size))
    kind, message = (RuntimeError, "negative dimension")
    if size > 0:
        kind, message = (UserError, "out of memory during training: lower clip.activation_memory_gib=.*batch_size=3")
    with pytest.raises(kind, match=message):
        Trainer(towers, group_prompts(towers), sets, tokens, CONFIG, epochs=1, seed=5).train()


def test_snapshots_round_trip(tmp_path):
    records = [StepRecord(step, 1, 0.1, (0.5, 0.25), (1.0, 0.0)) for step in (1, 4)]
    gradients = torch.randn(2, 2, 7)
    layout = {"mmap.source": [2, 3, 1], "mmap.text_scaling": [1, 1, 1]}
    file = tmp_path / "snapshots.parquet"
    snapshots = [Snapshot(*snapshot) for snapshot in zip(records, gradients, torch.randn(2, 7))]
    write_snapshots(file, TASKS, snapshots, layout)
    np.testing.assert_array_equal(read_gradients(file, TASKS), gradients.double().numpy())
    np.testing.assert_array_equal(read_gradients(file, TASKS[::-1]), gradients.double().numpy()[:, ::-1])
    table = pq.read_table(file)
    assert table.column_names == ["step", "epoch", "task", "loss", "gradient", "layer_norms"]
    assert json.loads(table.schema.metadata[b"layout"]) == layout
    assert table["loss"].to_pylist() == [0.5, 0.25, 0.5, 0.25]
    with pytest.raises(UserError, match="step 1 lacks the tasks neon"):
        read_gradients(file, ["ink", "neon"])
    with pytest.raises(UserError, match="no gradient snapshots"):
        read_gradients(tmp_path / "absent.parquet", TASKS)
    write_trajectory(tmp_path / "points.parquet", reversed(snapshots))
    for snapshot, (step, epoch, point) in zip(snapshots, read_trajectory(tmp_path / "points.parquet"), strict=True):
        assert (step, epoch) == (snapshot.record.step, snapshot.record.epoch) and torch.equal(
            point, snapshot.parameters
        )
    with pytest.raises(UserError, match="cannot be read as gradient snapshots"):
        read_trajectory(file)


@pytest.fixture
def split_reader(tmp_path, monkeypatch):
    """A split folder of test images in many row groups and files."""
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 3000)
    monkeypatch.setattr(parquet, "PART_BYTES", 8000)
    write_test_splits(tmp_path)
    return SplitReader(tmp_path / "splits")


def watch_rows(monkeypatch, change: Callable[[dict], dict]) -> None:
    """Apply `change` to every row of a reader."""
    rows = SplitReader.rows
    monkeypatch.setattr(SplitReader, "rows", lambda *arguments: map(change, rows(*arguments)))


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_predictions_equal_a_simple_loop(split_reader, monkeypatch, device):
    batches_of_4 = partial(decoded_batches, batch_size=4)
    monkeypatch.setattr("pipeline.training.evaluate.decoded_batches", batches_of_4)
    classifier = prompted_classifier(device)
    counts = []
    tasks = ("neon", "chalk", "ink")
    predictions = evaluate(classifier, split_reader, tasks, threads=3, on_images=counts.append)

    rows = [(task, row) for task in tasks for row in split_reader.rows("test", task, ("image", "label", "path"))]
    assert sum(counts) == len(predictions) == len(rows) == sum(TEST_COUNTS.values())
    for prediction, (task, row) in zip(predictions, rows):
        pixels = torch.from_numpy(evaluation_pixels(row["image"], classifier.towers.preprocessing))
        probabilities = classifier.probabilities(task, pixels[None])[0].tolist()
        assert (prediction.task, prediction.path, prediction.label) == (task, row["path"], row["label"])
        assert prediction.predicted == int(np.argmax(probabilities))
        assert prediction.probability == pytest.approx(max(probabilities), rel=1e-9)
        assert prediction.loss == pytest.approx(-math.log(probabilities[row["label"]]), rel=1e-9)
    assert list(accuracy(predictions)) == list(mean_loss(predictions)) == list(tasks)
    for task in tasks:
        losses = [prediction.loss for prediction in predictions if prediction.task == task]
        assert mean_loss(predictions)[task] == pytest.approx(sum(losses) / TEST_COUNTS[task], rel=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_losses_are_of_the_logits_in_float64(split_reader, precision):
    """A sure prediction has a loss that float32 rounds to 0."""
    towers, _ = small_towers()
    towers.float().logit_scale.data.fill_(6)
    classifier = zero_shot(towers, precision=precision)
    batches = list(decoded_batches(split_reader, list(TEST_COUNTS), towers.preprocessing, 1))
    logits = [row.tolist() for task, _, pixels in batches for row in classifier.logits([task], pixels)[task]]
    predictions = evaluate_decoded(classifier, batches)
    for prediction, values in zip(predictions, logits, strict=True):
        true_value = values.pop(prediction.label)
        expected = math.log1p(sum(math.exp(value - true_value) for value in values))
        assert prediction.loss == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert min(prediction.loss for prediction in predictions) < 1e-7


def zero_shot(towers, tasks=tuple(TEST_COUNTS), precision="auto") -> Classifier:
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_NAMES] * len(tasks))
    return Classifier(towers, [(tasks, tokens, Adaptation())], precision)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 5 images, or of as many steps as have no more."""
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 5)
    monkeypatch.setattr(evaluation, "FEATURE_BATCH_SIZE", 4)  # the labels of these images repeat after 5
    monkeypatch.setattr(frozen_features, "BATCH_SIZE", 5)


@pytest.mark.parametrize("stored_features", [False, True], ids=["images", "features"])
def test_evaluation_beyond_one_chunk_keeps_paths_and_labels(split_reader, small_chunks, stored_features):
    towers, _ = small_towers()
    classifier = zero_shot(towers)
    rows = [(task, row) for task in TEST_COUNTS for row in split_reader.rows("test", task, ("image", "label", "path"))]
    pixels = torch.stack([torch.from_numpy(evaluation_pixels(row["image"], towers.preprocessing)) for _, row in rows])
    if stored_features:
        features = towers.encode_image(towers.normalize_pixels(pixels)).split(list(TEST_COUNTS.values()))
        predictions = evaluate_features(classifier, split_reader, dict(zip(TEST_COUNTS, features)))
    else:
        predictions = evaluate(classifier, split_reader, list(TEST_COUNTS), threads=2)
    probabilities = classifier.probabilities("ink", pixels).tolist()
    for prediction, (task, row), row_probabilities in zip(predictions, rows, probabilities, strict=True):
        assert (prediction.task, prediction.path, prediction.label) == (task, row["path"], row["label"])
        assert prediction.predicted == int(np.argmax(row_probabilities))
        assert prediction.probability == pytest.approx(max(row_probabilities), rel=1e-9)
        assert prediction.loss == pytest.approx(-math.log(row_probabilities[row["label"]]), rel=1e-9)


@pytest.mark.parametrize("batch_size, counts", [(2, [2, 4, 6, 7]), (3, [1, 2, 3, 4, 5, 6, 7])])
def test_frozen_features_beyond_one_chunk_are_those_of_each_step(problem, small_chunks, batch_size, counts):
    towers, _, _, (training_set, _) = problem
    config = CONFIG.model_copy(update={"batch_size": batch_size})
    reported = []
    features = frozen_training_features(towers, training_set, 7, config, 5, "float32", reported.append)
    assert reported == counts
    for step, step_features in enumerate(features):
        pixels, _ = training_set.batch(step, batch_size, towers.preprocessing, config.augmentation, 5)
        torch.testing.assert_close(step_features, towers.encode_image(towers.normalize_pixels(pixels)))
    assert len(features) == 7


def test_frozen_split_features_beyond_one_chunk_are_those_of_each_image(split_reader, small_chunks):
    towers, _ = small_towers()
    reported = []
    features = frozen_split_features(towers, split_reader, "chalk", 2, "float32", reported.append)
    assert reported == [5, 10, 15, 20, 23]
    pixels = [
        torch.from_numpy(evaluation_pixels(row["image"], towers.preprocessing))
        for row in split_reader.rows("test", "chalk", ("image",))
    ]
    torch.testing.assert_close(features, towers.encode_image(towers.normalize_pixels(torch.stack(pixels))))


def use_processes(monkeypatch):
    monkeypatch.setattr("pipeline.data.decoding_pool.MAX_THREADS", 1)
    monkeypatch.setattr("pipeline.data.decoding_pool.MIN_IMAGES", 0)


def test_many_images_are_decoded_in_processes():
    for workers, num_images, kind in [
        (MAX_THREADS, MIN_IMAGES, ThreadPoolExecutor),
        (MAX_THREADS + 1, MIN_IMAGES - 1, ThreadPoolExecutor),
        (MAX_THREADS + 1, MIN_IMAGES, ProcessPoolExecutor),
    ]:
        with decoding_pool(workers, num_images) as pool:
            assert type(pool) is kind


@pytest.fixture(params=["threads", "processes"])
def decoding(request, monkeypatch):
    """Decode in threads or processes, which end with their batches."""
    if request.param == "processes":
        use_processes(monkeypatch)
    threads = set(threading.enumerate())
    yield request.param
    assert set(threading.enumerate()) <= threads
    assert not multiprocessing.active_children()


def test_batches_hold_the_stored_images_of_one_task(split_reader, decoding):
    batches = list(decoded_batches(split_reader, list(TEST_COUNTS), Preprocessing(16), threads=2, batch_size=5))
    assert [(task, len(rows)) for task, rows, _ in batches] == (
        [("chalk", 5)] * 4 + [("chalk", 3), ("ink", 3), ("neon", 5), ("neon", 3)]
    )
    for task in TEST_COUNTS:
        rows = list(split_reader.rows("test", task, ("image", "label", "path")))
        task_batches = [batch for batch in batches if batch[0] == task]
        assert [row for _, batch, _ in task_batches for row in batch] == [
            {"label": row["label"], "path": row["path"]} for row in rows
        ]
        plain = [torch.from_numpy(evaluation_pixels(row["image"], Preprocessing(16))) for row in rows]
        assert torch.equal(torch.cat([pixels for _, _, pixels in task_batches]), torch.stack(plain))


def test_reading_ahead_is_bounded_and_ends_with_the_consumer(split_reader, monkeypatch):
    read = []
    watch_rows(monkeypatch, lambda row: read.append(row["path"]) or row)
    threads = set(threading.enumerate())
    batches = decoded_batches(split_reader, list(TEST_COUNTS), Preprocessing(16), threads=2, batch_size=2)
    next(batches)
    end = time.monotonic() + 10
    while len(read) < 2 * (1 + PREFETCH_BATCHES) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)  # a slow model
    assert len(set(threading.enumerate()) - threads) in (2, 3)  # the reader, and one or two that decode
    assert len(read) == 2 * (1 + PREFETCH_BATCHES)
    batches.close()
    assert set(threading.enumerate()) <= threads
    assert len(read) == 2 * (1 + PREFETCH_BATCHES)


def test_a_damaged_test_image_is_reported(split_reader, monkeypatch, decoding):
    watch_rows(monkeypatch, lambda row: row | {"image": b"half"} if row["path"] == "ink/1/1.png" else row)
    towers, _ = small_towers()
    classifier = zero_shot(towers)
    counts = []
    with pytest.raises(UserError, match=r"test image ink/1/1\.png of task 'ink' cannot be decoded"):
        evaluate(classifier, split_reader, list(TEST_COUNTS), threads=2, on_images=counts.append)
    assert sum(counts) <= TEST_COUNTS["chalk"]


def test_a_process_that_dies_is_reported(split_reader, monkeypatch):
    use_processes(monkeypatch)
    batches = decoded_batches(split_reader, list(TEST_COUNTS), Preprocessing(16), threads=2, batch_size=2)
    next(batches)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(UserError, match=r"a process that decodes images died.* lower cluster\.cpus_per_worker"):
        list(batches)


def test_decoding_processes_end_with_a_killed_job():
    code = """
import time
from pipeline.data import decoding_pool
if __name__ == "__main__":
    decoding_pool.MAX_THREADS = 1
    pool = decoding_pool.decoding_pool(2, decoding_pool.MIN_IMAGES)
    calls = [pool.submit(time.sleep, 1) for _ in range(2)]
    print(*pool._processes, flush=True)
    calls[0].result()
    print("started", flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as job:
        pids = list(map(int, job.stdout.readline().split()))
        assert len(pids) == 2 and job.stdout.readline() == "started\n"
        assert all(map(psutil.pid_exists, pids))
        job.kill()
    end = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids))


def test_a_model_that_fails_leaves_no_threads(split_reader, decoding):
    towers, _ = small_towers()
    classifier = zero_shot(towers, ("neon",))
    with pytest.raises(KeyError, match="chalk"):
        evaluate(classifier, split_reader, list(TEST_COUNTS), threads=2)


def test_a_missing_test_set_file_is_reported(split_reader):
    next((split_reader.folder / "test").glob("ink-*.parquet")).unlink()
    with pytest.raises(UserError, match="images of task 'ink', splits.json says 3"):
        list(decoded_batches(split_reader, list(TEST_COUNTS), Preprocessing(16), threads=2))
