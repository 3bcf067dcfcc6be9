"""Data-parallel training equals training with one worker."""

from __future__ import annotations

from dataclasses import astuple
from datetime import timedelta
from functools import partial
from typing import get_args
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from small_methods import TRAINED, WORDS, build_method, method_sets, method_tokens
from small_problem import (
    CONFIG,
    TASKS,
    TEST_COUNTS,
    group_prompts,
    mmap_shape,
    prompted_classifier,
    small_problem,
    write_test_splits,
)
from torch.multiprocessing.spawn import spawn

from pipeline.config import TrainingConfig
from pipeline.data.parquet import SplitReader
from pipeline.methods.mmap import SharedMmap
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.distributed import DistributedShard
from pipeline.training.evaluate import decoded_batches, evaluate
from pipeline.training.trainer import Trainer

AGGREGATIONS = [name for name in get_args(TrainingConfig.model_fields["aggregation"].annotation) if name != "sum"]
SLOW = CONFIG.model_copy(update={"learning_rate": 1e-3})


def train_all(folder=None):
    """Return a group's trained prompts, those by each aggregation with tasks' weights, a global prompt's history and
    snapshots, and every other trained method, with the losses and accuracies of its steps."""
    towers, _, tokens, sets = small_problem()
    group = group_prompts(towers)
    Trainer(towers, group, sets, tokens, CONFIG, epochs=2, seed=5, checkpoints=folder and Checkpoints(folder)).train()
    shared = SharedMmap(mmap_shape(towers), TASKS, seed=1, init_std=0.3).double()
    trainer = Trainer(towers, shared, sets, tokens, CONFIG, epochs=2, seed=5, snapshot_every=3)
    history = trainer.train()
    weighed, weights = {}, {}
    for name in AGGREGATIONS:
        weighed[name], config = group_prompts(towers), CONFIG.model_copy(update={"aggregation": name})
        steps = Trainer(towers, weighed[name], sets, tokens, config, epochs=1, seed=5).train()
        weights[name] = torch.tensor([record.weights for record in steps], dtype=torch.float64)
    methods, records = {}, {}
    for name in TRAINED:
        method = methods[name] = build_method(name, towers)
        tokens, sets = method_tokens(name, towers, list(WORDS.values())), method_sets(name, towers)
        steps = Trainer(towers, method, sets, tokens, SLOW, epochs=1, seed=5).train()
        values = [[*record.losses, *record.accuracies] for record in steps]
        records[name] = torch.tensor(
            [[torch.nan if value is None else value for value in row] for row in values], dtype=torch.float64
        )
    return {
        "state": group.state_dict(),
        "weighed": {name: prompts.state_dict() for name, prompts in weighed.items()},
        "weights": weights,
        "methods": {name: method.state_dict() for name, method in methods.items()},
        "records": records,
        "losses": [record.losses for record in history],
        "accuracies": [record.accuracies for record in history],
        "snapshots": [snapshot.gradients for snapshot in trainer.snapshots],
        "points": [snapshot.parameters for snapshot in trainer.snapshots],
    }


def predict_all(folder):
    """Return predictions of test sets of 6 + 1 + 2 batches, as tuples."""
    with patch("pipeline.training.evaluate.decoded_batches", partial(decoded_batches, batch_size=4)):
        predictions = evaluate(prompted_classifier(), SplitReader(folder / "splits"), tuple(TEST_COUNTS), threads=1)
    return [astuple(prediction) for prediction in predictions]


def run_rank(rank: int, world_size: int, folder) -> None:
    torch.set_num_threads(1)
    meeting, patience = f"file://{folder}/meeting", timedelta(minutes=15)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=patience)
    try:
        torch.save(train_all(folder / "checkpoints"), folder / f"rank{rank}.pt")
        torch.save(predict_all(folder), folder / f"predicted{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_later_rank(index: int, world_size: int, folder) -> None:
    run_rank(index + 1, world_size, folder)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.fault_injection)])
def test_data_parallel_workers_give_the_results_of_one(world_size, tmp_path):
    write_test_splits(tmp_path)
    # The first rank is this process, which has imported everything.
    processes = spawn(run_later_rank, (world_size, tmp_path), nprocs=world_size - 1, join=False)
    run_rank(0, world_size, tmp_path)
    while not processes.join():
        pass
    expected, expected_predictions = train_all(), predict_all(tmp_path)
    for rank in range(world_size):
        result = torch.load(tmp_path / f"rank{rank}.pt")
        for name in ("state", "weighed", "weights", "methods", "records", "losses", "snapshots", "points"):
            tolerance = 1e-5 if name in ("snapshots", "points") else 1e-9  # stored in float32
            tolerance = 1e-6 if name == "weights" else tolerance  # where solvers stop
            torch.testing.assert_close(result[name], expected[name], rtol=tolerance, atol=tolerance, equal_nan=True)
        assert result["accuracies"] == expected["accuracies"]
        assert torch.load(tmp_path / f"predicted{rank}.pt") == expected_predictions
    assert (tmp_path / "checkpoints" / "checkpoint.pt").is_file()


def test_shards_cover_every_row_once():
    rows_per_task = [3, 1, 0, 5]
    for world_size in (1, 2, 4, 9):
        covered = []
        for rank in range(world_size):
            parts = DistributedShard(rank, world_size).shard_slices(rows_per_task)
            start, stop = DistributedShard(rank, world_size).row_range(sum(rows_per_task))
            rank_rows = [(task, row) for task, part in enumerate(parts) for row in range(part.start, part.stop)]
            assert len(rank_rows) == stop - start >= 1
            covered += rank_rows
        assert covered == [(task, row) for task, count in enumerate(rows_per_task) for row in range(count)]
