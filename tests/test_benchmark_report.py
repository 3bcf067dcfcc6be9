"""Tables and figures of a benchmark against numpy; the paper's results against each other and its text."""

import csv
import io
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from rich.console import Console
from scipy.stats import t

from pipeline.methods.registry import VARIANTS
from pipeline.report.benchmark_figures import accuracy_parameters_figure, prompt_ablation_figure, shots_figure
from pipeline.report.benchmark_tables import (
    Benchmark,
    Result,
    Row,
    Table,
    comparison_table,
    framework_table,
    main_tables,
    recommendations,
    to_csv,
    to_latex,
    to_markdown,
    to_rich,
    variant_section,
    variant_title,
)
from pipeline.report.paper_results import MINI_DOMAINNET, OFFICE_HOME, TRAINED_PARAMETERS, paper_results_for

OFFICE_TASKS = ("Art", "Clipart", "Product", "Real World")
OTHER_TASKS = ("birds", "cars_100%", "R&D #1")
MMAP_VERSIONS = ("mmap_task_only", "mmap_group_only", "mmap_random_groups", "all_in_one", "grouped")
PAPER_METHODS = ("zero_shot", *TRAINED_PARAMETERS)
ALL_METHODS = (*VARIANTS, "unknown_method", "another one")


def simulate(tasks=OTHER_TASKS, methods=("zero_shot", "coop", "coop_mt", "grouped"), shots=(6,), seeds=(1, 2, 3)):
    """Benchmark with random accuracies; only zero-shot has no trained parameters."""
    rng = np.random.default_rng(0)
    results = []
    for num_shots in shots:
        for method in methods:
            level = rng.uniform(0.75, 0.82)
            parameters = 0 if method == "zero_shot" else int(10 ** rng.uniform(4, 7))
            for seed in seeds:
                accuracy = {task: float(level - 0.06 * i + rng.normal(0, 0.004)) for i, task in enumerate(tasks)}
                results.append(Result(method, num_shots, seed, accuracy, parameters))
    return Benchmark("made up", tuple(tasks), tuple(results), "ViT-B-32", ("5 epochs.",))


def constant(method, accuracy_by_seed, shots=6, tasks=OTHER_TASKS):
    """Runs of a method with the same accuracy on every task."""
    return [Result(method, shots, seed, dict.fromkeys(tasks, value), 10) for seed, value in accuracy_by_seed.items()]


def make_benchmark(*runs, tasks=OTHER_TASKS):
    return Benchmark("made up", tasks, tuple(result for method_runs in runs for result in method_runs), "ViT-B-32")


def drop(benchmark, condition):
    return replace(benchmark, results=tuple(result for result in benchmark.results if not condition(result)))


def find_row(table: Table, method: str) -> Row:
    (row,) = (row for row in table.rows if row.kind == "ours" and row.cells[0].text == variant_title(method))
    return row


def texts(row: Row) -> list[str]:
    return [cell.text for cell in row.cells]


# --- the paper's results --------------------------------------------------------------------------------


@pytest.mark.parametrize("paper", [OFFICE_HOME, MINI_DOMAINNET], ids=lambda paper: paper.data_set)
def test_paper_tables_are_complete(paper):
    for shots, methods in paper.accuracy.items():
        assert set(methods) == set(PAPER_METHODS) == set(paper.average[shots])
        for method, tasks in methods.items():
            assert len(tasks) == 4
            for printed in (*tasks.values(), paper.average[shots][method]):
                assert 60 < printed.mean < 100
                assert (printed.deviation is None) == (method == "zero_shot")
                assert method == "zero_shot" or 0 < printed.deviation < 2


def test_two_printed_averages_differ_from_the_means_of_their_rows():
    inconsistent = {}
    for paper in (OFFICE_HOME, MINI_DOMAINNET):
        for shots, methods in paper.accuracy.items():
            for method, tasks in methods.items():
                printed = paper.average[shots][method].mean
                # In tenths, exactly: the printed average is off by at most half a tenth, and so is the mean of four.
                excess = abs(4 * round(10 * printed) - sum(round(10 * cell.mean) for cell in tasks.values()))
                if excess >= 4:
                    inconsistent[paper.data_set, shots, method] = printed
            expected = {
                method
                for data_set, num_shots, method in inconsistent
                if (data_set, num_shots) == (paper.data_set, shots)
            }
            assert set(paper.inconsistent_averages(shots)) == expected
    assert inconsistent == {("Office-Home", 12, "bitfit_mt"): 85.5, ("Office-Home", 12, "coop_mt"): 86.3}
    assert OFFICE_HOME.inconsistent_averages(12)["bitfit_mt"] == (85.5, pytest.approx(81.3))


def test_paper_results_agree_with_its_text():
    framework = OFFICE_HOME.framework
    for baseline, differences in (("mmap_random_groups", (0.68, 0.85)), ("all_in_one", (0.39, 0.41))):
        measured = tuple(framework[shots]["grouped"] - framework[shots][baseline] for shots in (6, 12))
        assert measured == pytest.approx(differences, abs=1e-9)
    for shots, values in framework.items():
        assert values["grouped"] == pytest.approx(OFFICE_HOME.task_mean(shots, "grouped"), abs=0.05)
    mini_average = MINI_DOMAINNET.average
    assert (mini_average[3]["grouped"].mean, mini_average[6]["grouped"].mean) == (84.9, 86.1)
    assert mini_average[6]["coop_mt"].mean - mini_average[6]["zero_shot"].mean == pytest.approx(0.9)
    assert mini_average[6]["maple_mt"].mean - mini_average[6]["zero_shot"].mean == pytest.approx(1.1)
    assert round(100 * TRAINED_PARAMETERS["grouped"] / TRAINED_PARAMETERS["full_finetune_mt"], 2) == 0.09
    for single in ("full_finetune", "coop", "vpt", "maple"):  # four tasks, each with its own
        assert TRAINED_PARAMETERS[single] == pytest.approx(4 * TRAINED_PARAMETERS[f"{single}_mt"])
    assert TRAINED_PARAMETERS["clip_adapter"] == round(4 * 131_712 / 1e6, 2)


@pytest.mark.parametrize(
    ("tasks", "data_set"),
    [
        (OFFICE_TASKS, "Office-Home"),
        (("real", "product", "ART", "clip art"), "Office-Home"),
        (("art", "clipart", "product", "Real_World"), "Office-Home"),
        (("RealWorld", "Product", "Clipart", "Art"), "Office-Home"),
        (("clipart", "painting", "real", "sketch"), "MiniDomainNet"),
        (("Sketch", "Real", "Painting", "Clipart"), "MiniDomainNet"),
        (("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), None),
        (("clipart", "painting", "real"), None),
        (("clipart", "clip art", "painting", "real", "sketch"), None),
        ((), None),
    ],
)
def test_data_sets_are_recognized_by_their_tasks(tasks, data_set):
    paper = paper_results_for(tasks)
    assert (paper.data_set if paper else None) == data_set
    if paper:
        for methods in paper.accuracy.values():
            assert all(set(by_task) == set(tasks) for by_task in methods.values())


def test_paper_results_use_the_given_task_names():
    paper = paper_results_for(("real_world", "product", "clipart", "art"))
    assert paper.accuracy[6]["grouped"]["real_world"] == (90.9, 0.9)
    assert paper.accuracy[12]["full_finetune_mt"]["clipart"] == (78.8, 1.0)
    assert paper_results_for(("clipart", "painting", "real", "sketch")).accuracy[3]["zero_shot"]["sketch"] == (
        79.9,
        None,
    )


# --- the main table -------------------------------------------------------------------------------------


def test_cells_equal_numpy():
    benchmark = simulate(shots=(3, 6))
    tables = main_tables(benchmark)
    assert [re.search(r"(\d+)-shot test accuracy \(%\), (\d) seeds", table.title).groups() for table in tables] == [
        ("3", "3"),
        ("6", "3"),
    ]
    for shots, table in zip((3, 6), tables, strict=True):
        assert table.header == ("method", *OTHER_TASKS, "average", "trained parameters")
        assert len(table.alignment) == len(table.header)
        for method in benchmark.methods:
            runs = benchmark.runs(method, shots)
            values = np.array([[100 * run.accuracy[task] for task in OTHER_TASKS] for run in runs])
            values = np.column_stack([values, values.mean(axis=1)])  # an average is that of a run
            expected = [f"{m:.1f} ± {s:.1f}" for m, s in zip(values.mean(axis=0), values.std(axis=0, ddof=1))]
            expected = [variant_title(method), *expected, f"{runs[0].trained_parameters:,}"]
            assert texts(find_row(table, method)) == expected


def test_deviation_of_the_average_is_not_that_of_the_tasks():
    """One task up and the other down by as much: the average does not move."""
    runs = [Result("coop", 6, seed, {"a": 0.5 + 0.1 * seed, "b": 0.5 - 0.1 * seed}, 1) for seed in range(3)]
    (table,) = main_tables(Benchmark("x", ("a", "b"), tuple(runs), "none"))
    assert texts(find_row(table, "coop"))[1:4] == ["60.0 ± 10.0", "40.0 ± 10.0", "50.0 ± 0.0"]


def test_one_seed_has_no_deviation():
    (table,) = main_tables(simulate(seeds=(7,)))
    assert table.title.endswith("1 seed")
    assert not any("±" in text for row in table.rows for text in texts(row))
    assert not any("±" in note for note in table.notes)


def test_missing_runs_are_marked():
    benchmark = drop(simulate(shots=(3, 6)), lambda run: run.method == "coop" and (run.shots, run.seed) == (6, 2))
    benchmark = drop(benchmark, lambda run: run.method == "coop_mt" and run.shots == 3)
    table_3_shots, table_6_shots = main_tables(benchmark)
    remaining = [run.accuracy["birds"] for run in benchmark.runs("coop", 6)]
    assert len(remaining) == 2
    assert (
        texts(find_row(table_6_shots, "coop"))[1]
        == f"{100 * np.mean(remaining):.1f} ± {100 * np.std(remaining, ddof=1):.1f} (2)"
    )
    assert any("the number of seeds" in note for note in table_6_shots.notes)
    assert texts(find_row(table_3_shots, "coop_mt"))[1:] == ["—"] * 5
    assert not any("the number of seeds" in note for note in table_3_shots.notes)
    assert not texts(find_row(table_6_shots, "grouped"))[1].endswith(")")


def test_run_that_lacks_a_task_has_no_average():
    complete = {"a": 0.5, "b": 0.9}
    runs = (Result("coop", 6, 1, complete, 1), Result("coop", 6, 2, {"a": 0.7}, 1), Result("vpt", 6, 1, {"b": 0.1}, 1))
    benchmark = Benchmark("x", ("a", "b"), runs, "none")
    (table,) = main_tables(benchmark)
    assert texts(find_row(table, "coop"))[1:4] == ["60.0 ± 14.1", "90.0 (1)", "70.0 (1)"]
    assert texts(find_row(table, "vpt"))[1:4] == ["—", "10.0 (1)", "—"]
    assert [line["task"] for line in csv.DictReader(io.StringIO(to_csv(benchmark)))] == ["a", "b", "a", "b"]


def test_best_and_second_are_marked_as_printed_and_only_with_every_seed():
    benchmark = make_benchmark(
        constant("coop", {1: 0.8001, 2: 0.8001}),
        constant("vpt", {1: 0.8003, 2: 0.8003}),  # 80.0 as well
        constant("maple", {1: 0.79, 2: 0.79}),
        constant("full_finetune", {1: 0.78, 2: 0.78}),
        constant("bitfit", {1: 0.95}),  # the best, but with one seed
    )
    (table,) = main_tables(benchmark)
    marks = {method: {cell.mark for cell in find_row(table, method).cells[1:-1]} for method in benchmark.methods}
    assert marks == {"coop": {"best"}, "vpt": {"best"}, "maple": {"second"}, "full_finetune": {""}, "bitfit": {""}}
    assert all(row.cells[-1].mark == row.cells[0].mark == "" for row in table.rows)


def test_parameters_that_differ_between_seeds_are_a_range():
    """The groups, and with them the number of group prompts, differ between seeds."""
    runs = [replace(run, trained_parameters=1000 * run.seed) for run in constant("grouped", {3: 0.5, 1: 0.6, 2: 0.7})]
    (table,) = main_tables(make_benchmark(runs))
    assert texts(find_row(table, "grouped"))[-1] == "1,000–3,000"


def test_rows_are_in_sections_in_the_order_given():
    methods = ("unknown_method", "grouped", "vpt", "coop_mt", "zero_shot", "coop", "mmap_task_only")
    (table,) = main_tables(simulate(methods=methods))
    assert [(row.kind, row.cells[0].text) for row in table.rows] == [
        ("ours", "zero-shot"),
        ("section", "single-task"),
        ("ours", "VPT"),
        ("ours", "CoOp"),
        ("ours", "MmAP, task only"),
        ("section", "multi-task"),
        ("ours", "MmAP, grouped"),
        ("ours", "CoOp-MT"),
        ("section", "others"),
        ("ours", "unknown_method"),
    ]


def test_every_version_has_a_row_and_a_section():
    (table,) = main_tables(simulate(methods=ALL_METHODS))
    for method in ALL_METHODS:
        assert "—" not in texts(find_row(table, method))
    assert variant_section("zero_shot") == "zero-shot" and variant_section("unknown_method") == "others"
    for method, variant in VARIANTS.items():
        if method != "zero_shot" and variant.init_from is None:
            assert variant_section(method) == ("single-task" if variant.scope == "single-task" else "multi-task")
    # Single-task training, initialized by a multi-task training.
    assert VARIANTS["mvlpt"].scope == "single-task" and variant_section("mvlpt") == "multi-task"


# --- next to the paper -----------------------------------------------------------------------------------


def test_paper_rows_are_below_ours():
    methods = ("zero_shot", "maple", "clip_lora", "bitfit_mt", "coop_mt", "grouped")
    table, with_12_shots = main_tables(simulate(OFFICE_TASKS, methods, shots=(6, 12)))
    paper_rows = {texts(ours)[0]: texts(row) for ours, row in zip(table.rows, table.rows[1:]) if row.kind == "paper"}
    assert paper_rows == {
        "zero-shot": ["paper", "82.9", "68.3", "89.3", "90.1", "82.6", "—"],
        "MaPLe": ["paper", "84.4 ± 0.5", "72.8 ± 0.6", "92.2 ± 0.1", "90.4 ± 0.4", "85.0 ± 0.4", "19.2 M"],
        "BitFit-MT": ["paper", "79.1 ± 0.1", "67.8 ± 1.4", "86.7 ± 1.5", "85.9 ± 0.5", "79.9 ± 0.9", "0.17 M"],
        "CoOp-MT": ["paper", "84.3 ± 0.8", "73.0 ± 0.1", "92.7 ± 0.2", "90.7 ± 0.6", "85.2 ± 0.4", "0.01 M"],
        "MmAP, grouped": ["paper", "85.7 ± 0.5", "76.3 ± 0.6", "92.9 ± 0.5", "90.9 ± 0.9", "86.5 ± 0.6", "0.13 M"],
    }
    assert not any(cell.mark for row in table.rows if row.kind == "paper" for cell in row.cells)
    assert not any("are inconsistent" in note for note in table.notes)
    (note,) = (note for note in with_12_shots.notes if "are inconsistent" in note)
    assert "BitFit-MT 85.5 (mean of its tasks 81.3)" in note


def test_paper_columns_follow_the_order_of_our_tasks():
    (table,) = main_tables(simulate(("sketch", "real", "clipart", "painting"), ("grouped",), shots=(3,)))
    assert texts(table.rows[-1])[:5] == ["paper", "79.8 ± 0.7", "92.2 ± 0.2", "83.9 ± 0.3", "83.5 ± 0.2"]


@pytest.mark.parametrize(("tasks", "shots"), [(OFFICE_TASKS, 3), (OTHER_TASKS, 6)])
def test_no_paper_rows_without_paper_results(tasks, shots):
    benchmark = simulate(tasks, (*PAPER_METHODS, *MMAP_VERSIONS[:-1]), shots=(shots,))
    for table in (*main_tables(benchmark), framework_table(benchmark)):
        assert not any(row.kind == "paper" for row in table.rows)
        assert "paper" not in " ".join((*table.header, *table.notes))


def test_framework_table_has_parts_and_paper_columns():
    benchmark = simulate(OFFICE_TASKS, ("coop", *reversed(MMAP_VERSIONS)), shots=(1, 6, 12))
    table = framework_table(benchmark)
    assert table.header == (
        *("variant", "task prompt", "group prompt", "groups"),
        *("1 shot", "6 shots", "paper", "12 shots", "paper"),
    )
    assert [texts(row)[1:4] for row in table.rows] == [
        ["✓", "", "single-task"],
        ["", "✓", "found groups"],
        ["✓", "✓", "random groups"],
        ["✓", "✓", "multi-task"],
        ["✓", "✓", "found groups"],
    ]
    for method, row in zip(MMAP_VERSIONS, table.rows, strict=True):
        averages = [100 * np.mean(list(run.accuracy.values())) for run in benchmark.runs(method, 12)]
        assert texts(row)[7] == f"{np.mean(averages):.1f} ± {np.std(averages, ddof=1):.1f}"
    assert [texts(row)[6] for row in table.rows] == ["85.76", "86.05", "85.80", "86.09", "86.48"]
    assert [texts(row)[8] for row in table.rows] == ["86.97", "87.29", "86.92", "87.36", "87.77"]


def test_framework_table_shows_only_existing_variants():
    table = framework_table(simulate(methods=("coop", "grouped", "all_in_one")))
    assert [texts(row)[0] for row in table.rows] == ["MmAP, all in one group", "MmAP, grouped"]
    assert framework_table(simulate(methods=("coop", "zero_shot"))) is None


# --- paired differences ---------------------------------------------------------------------------------


def test_paired_differences_equal_numpy():
    benchmark = simulate(methods=("coop", "grouped"), seeds=range(5))
    ours, baseline = (
        np.array([np.mean(list(run.accuracy.values())) for run in benchmark.runs(method, 6)]) * 100
        for method in ("grouped", "coop")
    )
    differences = ours - baseline
    error = differences.std(ddof=1) / np.sqrt(5)
    difference, standard_error, better, finding = texts(find_row(comparison_table(benchmark), "coop"))[1:]
    assert float(difference.replace("−", "-")) == pytest.approx(differences.mean(), abs=0.005)
    assert float(standard_error) == pytest.approx(error, abs=0.005)
    assert better == f"{(differences > 0).sum()} of 5"
    assert (finding == "no difference") == (abs(differences.mean()) <= 2 * error)


def test_findings_of_the_comparison():
    """`grouped` has 80 % with every seed; the baselines differ in average, deviation and seeds."""
    benchmark = make_benchmark(
        constant("coop", {1: 0.78, 2: 0.79, 3: 0.785}),
        constant("vpt", {1: 0.83, 2: 0.82, 3: 0.825}),
        constant("maple", {1: 0.77, 2: 0.82, 3: 0.80}),
        constant("full_finetune", {1: 0.80, 2: 0.80, 3: 0.80}),
        constant("bitfit", {2: 0.70}),
        constant("clip_lora", {9: 0.70}),
        constant("clip_adapter", {3: 0.78, 9: 0.0, 1: 0.77}),
        constant("grouped", {1: 0.80, 2: 0.80, 3: 0.80}),
    )
    table = comparison_table(benchmark)
    assert {texts(row)[0]: texts(row)[1:] for row in table.rows if row.kind == "ours"} == {
        "CoOp": ["+1.50", "0.29", "3 of 3", "better"],
        "VPT": ["−2.50", "0.29", "0 of 3", "worse"],
        "MaPLe": ["+0.33", "1.45", "1 of 3", "no difference"],
        "full fine-tuning": ["+0.00", "0.00", "0 of 3", "no difference"],
        "BitFit": ["+10.00", "—", "1 of 1", "not testable (1 seed)"],
        "CLIP-LoRA": ["—", "—", "—", "no common seed"],
        "CLIP-Adapter": ["+2.50", "0.50", "2 of 2", "better"],
    }
    assert comparison_table(simulate(methods=("coop", "vpt"))) is None


def test_differences_are_paired():
    """Accuracies vary widely between seeds, but the two methods always differ by about one point."""
    baseline = {1: 0.5, 2: 0.7, 3: 0.9}
    ours = {1: 0.511, 2: 0.71, 3: 0.909}
    table = comparison_table(make_benchmark(constant("coop", baseline), constant("grouped", ours)))
    assert texts(find_row(table, "coop"))[1:] == ["+1.00", "0.06", "3 of 3", "better"]


def test_the_recommendation_is_over_common_seeds():
    """Seed 4 lacks one of the trainings; the groups found are ahead by 1, 2 and 3 points, and by 2 ± 0.1."""
    benchmark = make_benchmark(
        constant("coop", {1: 0.6, 2: 0.6, 3: 0.6}),
        constant("clip_adapter", {1: 0.99}),
        constant("each_alone", {1: 0.79, 2: 0.78, 3: 0.77, 4: 0.99}),
        constant("all_in_one", {1: 0.781, 2: 0.78, 3: 0.779}),
        constant("grouped", {1: 0.8, 2: 0.8, 3: 0.8, 4: 0.8}),
    )
    error, small_error = 0.01 / 3**0.5, 0.001 / 3**0.5
    chance = ", which may be chance" if 0.02 / error < t.ppf(1 - 0.05 / 6, 2) else ""
    assert chance and 0.02 / small_error > t.ppf(1 - 0.05 / 6, 2)
    assert recommendations(benchmark) == [
        f"6 shots, ± over 3 seeds: Train the groups found: 2.0 ± {100 * error:.1f} points above each task alone"
        f"{chance}; 2.0 ± {100 * small_error:.1f} points above all tasks in one group. The best other method, CoOp, is "
        "20.0 ± 0.0 points below that."
    ]
    assert not recommendations(drop(benchmark, lambda result: result.method == "each_alone"))
    assert not recommendations(drop(benchmark, lambda result: result.method == "each_alone" and result.seed < 4))


# --- validation of benchmarks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (constant("coop", {1: 0.5}) * 2, "2 results for coop with 6 shots and seed 1"),
        ([Result("coop", 6, 1, {"boats": 0.5}, 1)], "task 'boats' is not one of birds"),
        (constant("coop", {1: 81.3}), "accuracy 81.3 is not between 0 and 1"),
        (constant("coop", {1: float("nan")}), "accuracy nan is not between 0 and 1"),
    ],
)
def test_invalid_benchmarks_are_rejected(results, message):
    with pytest.raises(ValueError, match=message):
        make_benchmark(results)


def test_empty_benchmark():
    benchmark = make_benchmark()
    assert main_tables(benchmark) == [] and framework_table(benchmark) is None and comparison_table(benchmark) is None
    assert to_csv(benchmark).count("\n") == 1
    for draw in (
        lambda: accuracy_parameters_figure(benchmark, 6),
        lambda: shots_figure(benchmark, ["grouped"]),
        lambda: prompt_ablation_figure(simulate(methods=("coop",)), 6),
    ):
        with pytest.raises(ValueError, match="made up has no"):
            draw()


# --- writers --------------------------------------------------------------------------------------------


def sample_tables() -> list[Table]:
    benchmark = simulate(OFFICE_TASKS, ALL_METHODS, shots=(3, 6))
    benchmark = drop(benchmark, lambda run: run.method == "vpt" and run.seed == 1)
    return [*main_tables(benchmark), framework_table(benchmark), comparison_table(benchmark), *main_tables(simulate())]


def test_markdown_rows_have_every_column():
    for table in sample_tables():
        title, blank, *lines = to_markdown(table).splitlines()
        assert title == f"### {table.title}" and blank == ""
        assert len([line for line in lines if line.startswith("| ")]) == len(table.rows) + 2
        assert {line.count(" | ") for line in lines if line.startswith("| ")} == {len(table.header) - 1}
        assert [line for line in lines if line.startswith("- ")] == [f"- {note}" for note in table.notes]


def test_latex_is_a_complete_tabular():
    for table in sample_tables():
        text = "\n".join(line for line in to_latex(table).splitlines() if not line.startswith("%"))
        assert text.startswith(rf"\begin{{tabular}}{{{table.alignment}}}") and text.endswith(r"\end{tabular}")
        assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
        assert r"\midrule" + "\n" + r"\midrule" not in text
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert len(rows) == len(table.rows) + 1
        for row in rows:
            span = re.match(r"\\multicolumn\{(\d+)\}", row)
            columns = int(span[1]) if span else len(re.findall(r"(?<!\\)&", row)) + 1
            assert columns == len(table.header)
        assert text.count("{") - text.count("}") == text.count(r"\{") - text.count(r"\}")
        assert text.isascii()


def test_marks_and_special_characters_in_latex_and_markdown():
    benchmark = make_benchmark(
        constant("a_method|with $ and *", {1: 0.9, 2: 0.8}),
        constant("zero_shot", {1: 0.7, 2: 0.8}),
    )
    (table,) = main_tables(benchmark)
    latex, markdown = to_latex(table), to_markdown(table)
    assert r"method & birds & cars\_100\% & R\&D \#1 & average" in latex
    assert r"a\_method|with \$ and * & \textbf{85.0 $\pm$ 7.1} & \textbf" in latex
    assert r"zero-shot & \underline{75.0 $\pm$ 7.1} & \underline" in latex
    assert r"| a_method\|with $ and \* | **85.0 ± 7.1** | **" in markdown
    assert "| zero-shot | *75.0 ± 7.1* | *" in markdown


def test_notes_of_several_lines_stay_latex_comments():
    (table,) = main_tables(simulate())
    table = replace(table, notes=("first\nsecond",))
    assert "% first second\n" in to_latex(table)


def test_terminal_table_has_every_cell():
    for table in [*sample_tables(), *main_tables(simulate(methods=("[red]", "coop")))]:
        console = Console(width=400, file=io.StringIO())
        console.print(to_rich(table))
        output = console.file.getvalue()
        assert table.title in output
        for row in table.rows:
            assert any(all(text in line for text in texts(row)) for line in output.splitlines())


def test_terminal_marks_best_and_second():
    (table,) = main_tables(
        make_benchmark(constant("coop", {1: 0.9}), constant("vpt", {1: 0.8}), constant("full_finetune", {1: 0.7}))
    )
    cells = list(to_rich(table).columns[1].cells)
    assert [(str(cell), cell.style) for cell in cells] == [
        ("", ""),
        ("90.0", "bold"),
        ("80.0", "underline"),
        ("70.0", ""),
    ]


def test_csv_has_every_number():
    benchmark = simulate(OFFICE_TASKS, ("zero_shot", "vpt", "clip_lora", "grouped", "unknown, method"), shots=(3, 6))
    lines = list(csv.DictReader(io.StringIO(to_csv(benchmark))))
    read: dict[tuple, dict[str, float]] = {}
    for line in lines:
        run = (line["method"], int(line["shots"]), int(line["seed"]), int(line["trained_parameters"]))
        read.setdefault(run, {})[line["task"]] = float(line["accuracy"])
    results = tuple(Result(method, shots, seed, tasks, size) for (method, shots, seed, size), tasks in read.items())
    assert results == benchmark.results
    assert {(line["method"], line["title"], line["groups"]) for line in lines} == {
        ("zero_shot", "zero-shot", ""),
        ("vpt", "VPT", "single-task"),
        ("clip_lora", "CLIP-LoRA", "single-task"),
        ("grouped", "MmAP, grouped", "found groups"),
        ("unknown, method", "unknown, method", ""),
    }
    for line in lines:
        has_paper_result = line["shots"] == "6" and line["method"] in ("zero_shot", "vpt", "grouped")
        assert bool(line["paper_accuracy"]) == has_paper_result
    assert {line["paper_accuracy"] for line in lines if (line["method"], line["task"]) == ("vpt", "Art")} == {
        "",
        "0.837",
    }


# --- figures --------------------------------------------------------------------------------------------


LINES = ("zero_shot", "coop", "vpt", "coop_mt", "maple_mt", "full_finetune_mt", "clip_adapter", "grouped")


def wide_benchmark(num_methods: int = 30) -> Benchmark:
    """Benchmark with six tasks, one number of shots, and invented methods if VARIANTS has too few."""
    names = dict.fromkeys((*ALL_METHODS, *(f"method {number}" for number in range(num_methods))))
    methods = ["grouped", *(name for name in names if name != "grouped")][:num_methods]
    return simulate(("clipart", "painting", "real", "sketch", "infograph", "quickdraw"), methods, shots=(16,))


def sample_figures() -> dict[str, Figure]:
    office = simulate(OFFICE_TASKS, (*PAPER_METHODS, "joint_prompts_mt", "mlp_prompts_mt"), shots=(1, 6, 12))
    patchy = drop(office, lambda run: run.method == "coop" and (run.shots == 6 or run.seed == 1))
    one_seed = replace(office, results=tuple(run for run in office.results if run.seed == 2))
    long_names = simulate(
        [f"a $task_{number} with a long name" for number in range(6)], (*LINES, "joint_prompts_mt"), shots=(2, 4)
    )
    figures = {}
    for name, benchmark in (
        ("office", office),
        ("patchy", patchy),
        ("one seed", one_seed),
        ("long names", long_names),
        ("wide", wide_benchmark()),
    ):
        shots = benchmark.shots[-1]
        figures[f"{name}: parameters"] = accuracy_parameters_figure(benchmark, shots)
        figures[f"{name}: shots"] = shots_figure(benchmark, LINES)
        figures[f"{name}: ablation"] = prompt_ablation_figure(benchmark, shots)
    return figures


def test_figures_are_saved_uncut_without_warnings_or_pyplot_state():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, figure in sample_figures().items():
            for kind, signature in (("png", b"\x89PNG"), ("svg", b"<?xml")):
                picture = io.BytesIO()
                figure.savefig(picture, format=kind, dpi=60)
                assert picture.getvalue().startswith(signature) and len(picture.getvalue()) > 5_000, name
            extent = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
            assert extent.x0 >= -1 and extent.y0 >= -1, name
            assert extent.x1 <= figure.bbox.x1 + 1 and extent.y1 <= figure.bbox.y1 + 1, name
    assert Gcf.get_all_fig_managers() == []


def titles_and_circles(figure: Figure):
    """Return axes, the titles' boxes in pixels by text, and the circles' centers and radii in pixels."""
    figure.canvas.draw()
    (axes,) = figure.axes
    labels = {text.get_text(): text.get_window_extent() for text in axes.texts if isinstance(text, Annotation)}
    circles = []
    for points in axes.collections:
        ((x, y),) = axes.transData.transform(points.get_offsets())
        radius = (points.get_sizes()[0] / np.pi) ** 0.5 * figure.dpi / 72
        circles.append((x, y, radius))
    return axes, labels, circles


def check_titles(figure: Figure, num_titles: int, num_circles: int) -> None:
    axes, labels, circles = titles_and_circles(figure)
    assert len(labels) == num_titles and len(circles) == num_circles
    bounds = axes.get_window_extent()
    boxes = list(labels.values())
    for number, box in enumerate(boxes):
        assert bounds.x0 <= box.x0 and box.x1 <= bounds.x1 and bounds.y0 <= box.y0 and box.y1 <= bounds.y1
        assert not any(box.overlaps(other_box) for other_box in boxes[number + 1 :])
        for x, y, radius in circles:
            assert np.hypot(x - np.clip(x, box.x0, box.x1), y - np.clip(y, box.y0, box.y1)) >= radius


@pytest.mark.parametrize("num_methods", [1, 12, 30])
@pytest.mark.parametrize("with_paper", [False, True])
def test_titles_of_circles_are_inside_and_overlap_nothing(num_methods, with_paper):
    if with_paper:
        methods = list(dict.fromkeys(("grouped", *PAPER_METHODS, *VARIANTS)))[:num_methods]
        figure = accuracy_parameters_figure(simulate(OFFICE_TASKS, methods, shots=(12,)), 12)
    else:
        methods = wide_benchmark(num_methods).methods
        figure = accuracy_parameters_figure(wide_benchmark(num_methods), 16)
    num_paper = len([method for method in methods if method in PAPER_METHODS]) if with_paper else 0
    check_titles(figure, len(methods), len(methods) + num_paper)


def test_titles_in_a_crowd_overlap_nothing():
    """Methods around one point: some leaders must cross titles, and no two titles are in one place."""
    crowd = {
        "zero_shot": (0, 56.9),
        "coop": (1_536, 56.7),
        "coop_mt": (256, 58.2),
        "vpt": (24_576, 70.3),
        "vpt_mt": (4_096, 71.8),
        "maple": (202_752, 66.5),
        "maple_mt": (33_792, 68.3),
        "clip_adapter": (12_768, 70.3),
        "clip_adapter_mt": (2_128, 74.6),
        "joint_prompts": (36_864, 67.9),
        "joint_prompts_mt": (6_144, 72.6),
        "mlp_prompts": (305_664, 63.5),
        "mlp_prompts_mt": (50_944, 68.7),
        "linear_probe": (3_840, 73.1),
        "linear_probe_mt": (640, 78.0),
        "lamm": (3_840, 67.6),
        "lamm_mt": (640, 63.5),
        "promptsrc": (18_432, 66.8),
        "promptsrc_mt": (3_072, 67.0),
        "bitfit": (52_608, 74.7),
        "bitfit_mt": (8_768, 79.5),
        "layernorm": (22_272, 80.1),
        "layernorm_mt": (3_712, 85.1),
        "full_finetune": (25_199_238, 83.9),
        "full_finetune_mt": (4_199_873, 90.8),
        "clip_lora": (55_296, 79.4),
        "clip_lora_mt": (9_216, 82.7),
        "mvlpt": (165_312, 67.5),
        "mvlpt_mt": (27_552, 64.3),
        "softcpt": (16_640, 59.1),
        "hipro": (2_816, 63.9),
        "mmap_group_only": (2_072, 65.5),
        "mmap_task_only": (6_216, 63.4),
        "each_alone": (12_432, 62.8),
        "all_in_one": (7_252, 63.0),
        "mmap_random_groups": (8_288, 62.5),
        "grouped": (8_288, 63.8),
    }
    methods = [constant(method, {1: accuracy / 100, 2: accuracy / 100}, 4) for method, (_, accuracy) in crowd.items()]
    benchmark = make_benchmark(*methods)
    results = [replace(run, trained_parameters=crowd[run.method][0]) for run in benchmark.results]
    figure = accuracy_parameters_figure(replace(benchmark, results=tuple(results)), 4)
    check_titles(figure, len(crowd), len(crowd))


def test_circles_are_at_their_values():
    benchmark = make_benchmark(
        constant("zero_shot", {1: 0.8, 2: 0.8}, 6, OFFICE_TASKS),
        constant("bitfit_mt", {1: 0.82, 2: 0.84}, 12, OFFICE_TASKS),
        constant("zero_shot", {1: 0.7, 2: 0.8}, 12, OFFICE_TASKS),
        tasks=OFFICE_TASKS,
    )
    results = [replace(run, trained_parameters=171_008 * (run.method != "zero_shot")) for run in benchmark.results]
    (axes,) = accuracy_parameters_figure(replace(benchmark, results=tuple(results)), 12).axes
    zero = axes.get_xticks()[0]
    assert axes.get_xticklabels()[0].get_text() == "0"
    positions = [tuple(points.get_offsets()[0]) for points in axes.collections]
    expected = [(171_008, 83), (170_000, 81.3), (zero, 75), (zero, 83.25)]  # the paper's average of BitFit: its tasks'
    assert sorted(positions) == [pytest.approx(position) for position in sorted(expected)]
    sizes = {tuple(points.get_offsets()[0])[0]: points.get_sizes()[0] for points in axes.collections}
    assert sizes[zero] < sizes[170_000] < sizes[171_008]


def test_lines_show_the_means():
    benchmark = simulate(OFFICE_TASKS, LINES, shots=(1, 6, 12))
    figure = shots_figure(benchmark, LINES)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == ["average", *OFFICE_TASKS]
    for name, axes in panels.items():
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        stars = [line for line in axes.lines if line.get_marker() == "*"]
        assert len(dashed) == len(stars) == 1 and list(dashed[0].get_xdata()) == [0, 1, 6, 12]
        assert stars[0].get_ydata()[0] == dashed[0].get_ydata()[0] == dashed[0].get_ydata()[1]
        curves = [container.lines[0].get_ydata() for container in axes.containers]
        for method, means in zip(LINES, [dashed[0].get_ydata()[1:], *curves], strict=True):
            task = None if name == "average" else name
            expected = [
                100 * np.mean(list(benchmark.accuracy_by_seed(method, shots, task).values())) for shots in (1, 6, 12)
            ]
            np.testing.assert_allclose(np.array(means, dtype=float), expected)
    styles = {
        (line.get_color(), line.get_marker())
        for line in panels["average"].get_figure().axes[-1].get_legend().get_lines()
    }
    assert len(styles) == len(LINES)


def test_one_seed_has_no_error_bars():
    for seeds, lengths in (((1,), []), ((1, 2), [1.0, 1.0])):
        runs = [constant("grouped", {seed: 0.5 + seed / 100 / 2**0.5 for seed in seeds}, shots) for shots in (1, 2)]
        (container,) = shots_figure(make_benchmark(*runs), ["grouped"]).axes[0].containers
        (bars,) = container.lines[2]
        bar_lengths = [np.ptp(bar[:, 1]) for bar in bars.get_segments() if np.isfinite(bar).all() and len(bar)]
        np.testing.assert_allclose(bar_lengths, lengths)


def test_bars_show_the_means_of_the_given_variant():
    benchmark = simulate(OFFICE_TASKS, ("joint_prompts_mt", "mlp_prompts_mt", "all_in_one", "grouped"))
    figure = prompt_ablation_figure(benchmark, 6, "all_in_one")
    (axes,) = figure.axes
    bars = {bars.get_label(): bars for bars in axes.containers if isinstance(bars, BarContainer)}
    assert list(bars) == ["joint prompts-MT", "MLP prompts-MT", "MmAP, all in one group"]
    bottom = axes.get_ylim()[0]
    for method, method_bars in zip(("joint_prompts_mt", "mlp_prompts_mt", "all_in_one"), bars.values()):
        for task, bar in zip((*OFFICE_TASKS, None), method_bars.patches, strict=True):
            mean = 100 * np.mean(list(benchmark.accuracy_by_seed(method, 6, task).values()))
            assert bar.get_y() + bar.get_height() == pytest.approx(mean) and bar.get_y() == bottom
    assert bottom > 0 and f"from {bottom:.0f}" in axes.get_ylabel()  # the label mentions a cut axis
