"""Stability of a grouping: the bootstrap, the next best partitions, phases of the training; the HTML page."""

from __future__ import annotations

import io
import re
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Text
from scipy.optimize import isotonic_regression

from pipeline.grouping.affinity import affinity_matrix, snapshot_affinities
from pipeline.grouping.partition import best_partition
from pipeline.grouping.stability import (
    MAX_TASKS_RANKED_ALL,
    bootstrap,
    early_share,
    groups_over_training,
    ranked_partitions,
    resample_snapshots,
    satisfies,
)
from pipeline.grouping.study import partition_score, set_partitions
from pipeline.methods.registry import VARIANTS
from pipeline.report.grouping_figures import co_assignment_map
from pipeline.report.grouping_page import grouping_page
from pipeline.report.grouping_stability_figures import BETWEEN, affinity_over_training, ranked_partitions_figure
from pipeline.report.summary_figures import accuracy_figure

NAMES = ("ink", "neon", "chalk", "noise")


def search(affinity):
    return best_partition(affinity, objective="sum").groups


def alternating(num_snapshots: int, turn: int):
    """Affinities that join 0 and 1 in the first `turn` snapshots and 0 and 2 after them."""
    affinities = np.full((num_snapshots, 4, 4), -1.0)
    affinities[:turn, 0, 1] = affinities[:turn, 1, 0] = 3
    affinities[turn:, 0, 2] = affinities[turn:, 2, 0] = 3
    return affinities


def test_mean_of_the_snapshot_affinities_is_the_affinity_matrix():
    gradients = np.random.default_rng(0).normal(size=(5, 4, 7))
    for kind in ("dot", "cosine"):
        affinities = snapshot_affinities(gradients, kind)
        np.testing.assert_allclose(affinities.mean(axis=0), affinity_matrix(gradients, kind), rtol=1e-12)


def test_resamples_agree_where_all_snapshots_do_and_differ_where_they_do_not():
    stable = bootstrap(resample_snapshots(alternating(30, 30)), search)
    assert stable.frequencies == {((0, 1), (2,), (3,)): 1.0} and stable.num_resamples == 200
    matrix = stable.co_assignment
    assert matrix[0, 1] == 1 and matrix[0, 2] == 0 and (np.diag(matrix) == 1).all()
    unstable = bootstrap(resample_snapshots(alternating(30, 15)), search)
    assert 0.2 < unstable.co_assignment[0, 1] < 0.8 and (unstable.co_assignment == unstable.co_assignment.T).all()
    assert sum(unstable.frequencies.values()) == pytest.approx(1) and len(unstable.frequencies) > 1
    assert list(unstable.frequencies.values()) == sorted(unstable.frequencies.values(), reverse=True)
    repeated = bootstrap(resample_snapshots(alternating(30, 15)), search)
    assert repeated.frequencies == unstable.frequencies and (repeated.co_assignment == unstable.co_assignment).all()
    assert bootstrap(resample_snapshots(alternating(30, 15)), search, seed=1).frequencies != unstable.frequencies
    assert bootstrap(resample_snapshots(alternating(30, 15)), search, time_limit_s=0).num_resamples == 1


def test_the_bootstrap_draws_blocks_of_neighbors():
    """Single snapshots would give a far too confident result with a signal that changes slowly."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=8)
    drift = np.repeat((values - values.mean()) / values.std(), 8)  # eight values, constant for eight snapshots each
    affinities = np.full((64, 2, 2), 0.0)
    affinities[:, 0, 1] = affinities[:, 1, 0] = drift + 0.25
    share = bootstrap(resample_snapshots(affinities), search).co_assignment[0, 1]
    single = [np.mean(rng.choice(affinities[:, 0, 1], 64)) > 0 for _ in range(400)]
    assert abs(share - 0.5) < abs(np.mean(single) - 0.5) - 0.03


def test_all_partitions_of_few_tasks_are_ranked():
    rng = np.random.default_rng(1)
    affinity = rng.normal(size=(4, 4))
    affinity += affinity.T
    best = search(affinity)
    ranked = ranked_partitions(affinity, best, "sum", NAMES, count=100)
    assert len(ranked) == 15 and ranked[0].groups == best
    assert {item.groups for item in ranked} == set(set_partitions(4))
    assert [item.score for item in ranked] == sorted((item.score for item in ranked), reverse=True)
    assert all(item.score == partition_score(affinity, item.groups, "sum") for item in ranked)
    assert ranked[0].title == " | ".join(" + ".join(NAMES[task] for task in group) for group in best)


def test_neighbors_of_the_best_partition_of_many_tasks_are_ranked():
    num_tasks = MAX_TASKS_RANKED_ALL + 2
    best = (tuple(range(4)), tuple(range(4, num_tasks - 1)), (num_tasks - 1,))
    affinity = np.random.default_rng(2).normal(size=(num_tasks, num_tasks))
    affinity += affinity.T
    names = [f"t{task}" for task in range(num_tasks)]
    ranked = ranked_partitions(affinity, best, "mean", names, count=1000)
    titles = {item.title: item.groups for item in ranked}
    assert ranked[0].title == "best partition"
    assert titles["t0 in group 3"] == ((0, num_tasks - 1), (1, 2, 3), best[1])
    assert titles["t5 by itself"] == ((0, 1, 2, 3), (4, 6, 7, 8), (5,), (num_tasks - 1,))
    assert titles["groups 1 and 2 merged"] == (tuple(range(num_tasks - 1)), (num_tasks - 1,))
    # 9 tasks move to 2 other groups or by themselves, the last one to 2; 3 merges, 2 of which equal a move
    assert len(ranked) == 1 + 9 * 3 + 3


def test_ranked_partitions_keep_the_constraints():
    affinity = np.ones((5, 5))
    constraints = {"num_groups": 2, "min_size": 2, "max_size": 3, "must_link": [(0, 4)], "cannot_link": [(1, 2)]}
    best = best_partition(affinity, objective="sum", **constraints).groups
    allowed = partial(satisfies, **constraints)
    ranked = ranked_partitions(affinity, best, "sum", "abcde", allowed, count=100)
    assert {item.groups for item in ranked} == {((0, 1, 4), (2, 3)), ((0, 2, 4), (1, 3))}
    assert len([groups for groups in set_partitions(5) if allowed(groups)]) == 2


def test_groups_by_phase_of_the_training():
    parts = groups_over_training(alternating(30, 12), list(range(1, 91, 3)), search, num_windows=5)
    assert [tuple(steps) for *steps, _ in parts] == [(1, 16), (19, 34), (37, 52), (55, 70), (73, 88)]
    assert [groups for *_, groups in parts] == [((0, 1), (2,), (3,))] * 2 + [((0, 2), (1,), (3,))] * 3
    assert len(groups_over_training(alternating(2, 1), [1, 2], search)) == 2


def test_share_of_the_early_snapshots_counts_both_signs_and_no_diagonal():
    affinities = np.zeros((30, 3, 3))
    affinities[:, np.arange(3), np.arange(3)] = 1000
    affinities[:3, 0, 1], affinities[:3, 0, 2] = 9, -9
    affinities[3:, 1, 2] = 1
    assert early_share(affinities) == pytest.approx(54 / (54 + 27))
    assert early_share(np.zeros((5, 2, 2))) == 0


@pytest.mark.parametrize(
    ("num_tasks", "groups"),
    [
        (1, [[0]]),
        (2, [[0, 1]]),
        (2, [[0], [1]]),
        (6, [[0, 1, 2], [3, 4], [5]]),
        (6, [range(6)]),
        (10, [range(5), range(5, 10)]),
        (20, [[task] for task in range(20)]),
    ],
)
def test_affinity_over_training_names_the_lines_of_groups_where_they_end(num_tasks, groups):
    """Distinct colors, labels at the ends without overlap, from the first step to the values of the matrix."""
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(40, num_tasks, 5)) * np.exp(-np.arange(40) / 4)[:, None, None]
    affinities = snapshot_affinities(gradients, "dot")
    names = [f"a long name of domain {task}" for task in range(num_tasks)]
    figure = affinity_over_training(affinities, range(1, 41), names, groups)
    figure.savefig(io.BytesIO())
    sums, by_step = figure.axes
    pairs = [line for line in sums.get_lines() if len(line.get_xdata()) == 40]
    assert all(line.get_xdata()[0] == 1 for line in (*pairs, *by_step.get_lines()[1:]))
    labels = {text.get_color(): text for text in sums.texts}
    within = [(i, j) for i, j in combinations(range(num_tasks), 2) if any({i, j} <= set(group) for group in groups)]
    if num_tasks <= 6:
        colored = [line for line in pairs if line.get_color() != BETWEEN]
        assert len({line.get_color() for line in colored}) == len(colored) == len(within)
        ends = [affinities[:, i, j].mean() for i, j in within]
        assert sorted(line.get_ydata()[-1] for line in colored) == pytest.approx(sorted(ends))
        assert {line.get_color() for line in colored} <= labels.keys()
        assert f"{100 * early_share(affinities):.0f} % from the first 4 of 40" in sums.get_title(loc="left")
    # As close to the ends of their lines as the gap allows.
    ends = sorted(sums.transAxes.inverted().transform(sums.transData.transform(text.xy))[1] for text in sums.texts)
    offsets = min(0.075, 1 / max(1, len(ends))) * np.arange(len(ends))
    closest = np.clip(isotonic_regression(ends - offsets).x, 0, 1 - offsets[-1]) if ends else np.zeros(0)
    assert sorted(text.xyann[1] for text in sums.texts) == pytest.approx(closest + offsets)
    boxes = sorted((Text.get_window_extent(text) for text in sums.texts), key=lambda box: box.y0)
    assert all(low.y1 < high.y0 + 1 for low, high in zip(boxes, boxes[1:]))
    assert all(box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_partitions_with_the_highest_scores_have_their_whole_names():
    names = [f"a long name of domain {task}" for task in range(6)]
    ranked = ranked_partitions(np.ones((6, 6)), (tuple(range(6)),), "sum", names)
    labels = [label.get_text() for label in ranked_partitions_figure(ranked).axes[0].get_yticklabels()]
    assert [" ".join(label.split()) for label in labels] == [item.title for item in ranked]
    assert max(len(line) for label in labels for line in label.splitlines()) < 90


@pytest.mark.parametrize(("num_tasks", "num_methods"), [(1, 7), (2, 3), (3, 28), (20, 7)])
def test_bars_of_many_tasks_and_methods_stay_on_a_page(num_tasks, num_methods):
    """All bars are there, with names that differ, in rows of at most a page's width."""
    tasks = [f"a long name of a ${task}$ domain {task}" for task in range(num_tasks)]
    methods = {
        method: {
            "accuracy": {task: (number + 1) / 100 for number, task in enumerate(tasks)},
            "average": 0.9,
            "standard_error": dict.fromkeys(tasks, 0.01),
            "average_standard_error": 0.01,
        }
        for method in [*VARIANTS][:num_methods]
    }
    figure = accuracy_figure(tasks, methods)
    figure.savefig(io.BytesIO())
    heights = [patch.get_height() for axes in figure.axes for patch in axes.patches]
    assert sorted(heights) == pytest.approx(sorted([*range(1, num_tasks + 1), 90] * num_methods))
    names = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
    assert len(set(names)) == num_tasks + 1 and max(map(len, names)) <= 24
    assert figure.get_figwidth() < 15
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1


def test_the_title_of_a_small_map_is_not_cut_off():
    figure = co_assignment_map(np.eye(2), ["ink", "neon"], [(0,), (1,)])
    figure.savefig(io.BytesIO())  # runs the layout
    extent = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert extent.x0 >= -1 and extent.x1 <= figure.bbox.x1 + 1


def test_figures_and_page():
    affinities = alternating(30, 12)
    groups = search(affinities.mean(axis=0))
    stable = bootstrap(resample_snapshots(affinities), search)
    ranked = ranked_partitions(affinities.mean(axis=0), groups, "sum", NAMES)
    figures = {
        "Co-assignment": co_assignment_map(stable.co_assignment, NAMES, groups),
        "During <training>": affinity_over_training(affinities, range(1, 31), NAMES, groups),
        "Next best": ranked_partitions_figure(ranked),
    }
    assert "ink + chalk" in [text.get_text() for text in figures["During <training>"].axes[0].texts]
    assert figures["Next best"].axes[0].get_yticklabels()[0].get_text() == ranked[0].title
    result = {
        "tasks": list(NAMES),
        "groups": [["ink", "chalk"], ["neon"], ["<b>noise"]],
        "objective": "sum",
        "affinity_kind": "gradient",
        "gradient_similarity": "dot",
        "gains": None,
        "candidates": [
            {"affinity": "gradient", "similarity": "dot", "groups": [["ink", "chalk"]], "is_taken": True},
            {"affinity": "features", "similarity": None, "groups": [["<i>", "neon"]], "is_taken": False},
        ],
        "warnings": ["beware & think"],
        "stability": {
            "num_resamples": 200,
            "resampled_from": "snapshots",
            "num_resampled": 30,
            "resampled": [
                {"groups": [["ink"], ["neon"]], "frequency": 0.5},
                {"groups": [["ink", "chalk"], ["neon"], ["<b>noise"]], "frequency": 0.25},
            ],
        },
        "training": {
            "early": {"num_snapshots": 3, "last_step": 3, "share": 0.954},
            "phases": [{"first_step": 1, "last_step": 9, "groups": [["ink", "neon"]]}],
        },
    }
    images = {}
    for title, figure in figures.items():
        figure.savefig(image := io.BytesIO())
        images[title] = (image.getvalue(), 640)
    page = grouping_page(result, "Optimal among 15 partitions", images)
    assert "Optimal among 15 partitions." in page
    assert "25 % of 200 bootstrap resamples of the snapshots give the same groups" in page
    assert "95 % of the affinities is from the first 3 of 30 snapshots (to step 3): these decide" in page
    assert "beware &amp; think" in page
    assert "&lt;b&gt;noise" in page and "<b>noise" not in page and "During &lt;training&gt;" in page
    assert len(re.findall("data:image/png;base64,[A-Za-z0-9+/=]{5000,}", page)) == 3
    assert "<td>1 to 9</td><td>ink + neon</td>" in page
    assert "<td>gradient (dot) (taken)</td><td>ink + chalk</td>" in page
    assert "<td>features</td><td>&lt;i&gt; + neon</td>" in page
    others = {**result, "training": None, "gains": [[0.1, -0.25], [0.3, 0.4]]}
    page = grouping_page(others, "Optimal", {})
    assert "phase of the training" not in page and "these decide" not in page
    assert ">−0.250</td>" in page and ">+0.300</td>" in page
