"""Tables of a benchmark: several variants, numbers of shots and seeds on one data set, next to the paper's results.

Conventions:
- A cell is the mean over seeds in %, ± the sample standard deviation for two or more seeds. Averages are taken over
  the tasks of each run first; their mean and deviation are then over runs.
- A cell with missing seeds gives their number in brackets, and is never marked as best. A dash means no run.
- Numbers are compared as printed, so that equal cells are marked alike.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Literal

import rich.table
from rich.text import Text

from pipeline.data.names import pluralize
from pipeline.methods.registry import DEFAULT_VARIANTS, VARIANTS, with_sources
from pipeline.report.metrics import ACCURACY
from pipeline.report.paper_results import TRAINED_PARAMETERS, PaperResults, Printed, paper_results_for
from pipeline.report.recommendation import QUANTILE, STRATEGIES, recommendation
from pipeline.report.scores import Estimate
from pipeline.report.summary import AVERAGE_ROW, PARAMETERS_ROW, method_title

ZERO_SHOT, OURS = "zero_shot", "grouped"
FRAMEWORK = ("mmap_task_only", "mmap_group_only", "mmap_random_groups", "all_in_one", "grouped")
SECTIONS = ZERO_SHOT_SECTION, SINGLE_TASK, MULTI_TASK, OTHER_SECTION = (
    "zero-shot",
    "single-task",
    "multi-task",
    "others",
)
MISSING = "—"

# --- results -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Result of one run of a variant. `accuracy`: measured task → 0 to 1, the metric of the benchmark."""

    method: str
    shots: int
    seed: int
    accuracy: dict[str, float]
    trained_parameters: int


@dataclass(frozen=True)
class Benchmark:
    """Results of a benchmark; variants keep the order in which they first occur in `results`."""

    name: str
    tasks: tuple[str, ...]
    results: tuple[Result, ...]
    clip: str
    protocol: tuple[str, ...] = ()
    """How the methods were trained, a sentence each."""
    metric: str = ACCURACY
    """ACCURACY or MAP."""

    def __post_init__(self) -> None:
        """Raises: ValueError: two results for one run, an unknown task, or an accuracy outside 0 to 1."""
        runs = Counter((result.method, result.shots, result.seed) for result in self.results)
        for (method, shots, seed), count in runs.items():
            if count > 1:
                raise ValueError(f"{count} results for {method} with {shots} shots and seed {seed}; give one")
        for result in self.results:
            for task, value in result.accuracy.items():
                if task not in self.tasks:
                    raise ValueError(f"{result.method}: task {task!r} is not one of {', '.join(self.tasks)}")
                if not 0 <= value <= 1:
                    raise ValueError(f"{result.method}, {task}: accuracy {value} is not between 0 and 1")

    @property
    def paper(self) -> PaperResults | None:
        """The paper's results for the same tasks, which are accuracies."""
        return paper_results_for(self.tasks) if self.metric == ACCURACY else None

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(result.method for result in self.results))

    @property
    def shots(self) -> list[int]:
        return sorted({result.shots for result in self.results})

    def seeds(self, shots: int) -> list[int]:
        return sorted({result.seed for result in self.results if result.shots == shots})

    def runs(self, method: str, shots: int) -> list[Result]:
        return [result for result in self.results if (result.method, result.shots) == (method, shots)]

    def accuracy_by_seed(self, method: str, shots: int, task: str | None = None) -> dict[int, float]:
        """Return seed → accuracy (0 to 1) of a task, or, without one, the plain mean of each run that has all tasks."""
        runs = self.runs(method, shots)
        if task is not None:
            return {run.seed: run.accuracy[task] for run in runs if task in run.accuracy}
        return {run.seed: fmean(run.accuracy.values()) for run in runs if len(run.accuracy) == len(self.tasks)}


def variant_title(method: str) -> str:
    """Return `summary.method_title`, or the name itself if VARIANTS lacks it."""
    return method_title(method) if method in VARIANTS else method


def variant_section(method: str) -> str:
    """Return one of SECTIONS; multi-task if other tasks influence a task's training, be it by its initialization."""
    if method == ZERO_SHOT:
        return ZERO_SHOT_SECTION
    if method not in VARIANTS:
        return OTHER_SECTION
    return SINGLE_TASK if {VARIANTS[name].scope for name in with_sources([method])} == {"single-task"} else MULTI_TASK


# --- tables ---------------------------------------------------------------------------------------------


Mark = Literal["", "best", "second"]


@dataclass(frozen=True)
class Cell:
    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Row:
    """A row of a table. `kind`: a "section" fills only the first cell; "paper" belongs to the row above."""

    cells: tuple[Cell, ...]
    kind: Literal["ours", "paper", "section"] = "ours"


@dataclass(frozen=True)
class Table:
    """A table. `alignment`: l, c or r for each column."""

    title: str
    header: tuple[str, ...]
    alignment: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def main_tables(benchmark: Benchmark) -> list[Table]:
    """Return the paper's Tables 1 and 2 for each number of shots: a row per variant, a column per task."""
    paper = benchmark.paper
    return [_main_table(benchmark, shots, paper) for shots in benchmark.shots]


def _main_table(benchmark: Benchmark, shots: int, paper: PaperResults | None) -> Table:
    columns = (*benchmark.tasks, None)
    num_seeds = len(benchmark.seeds(shots))
    cells_by_column = [_marked_column(benchmark, benchmark.methods, shots, task) for task in columns]
    printed = paper.accuracy.get(shots, {}) if paper else {}
    rows: list[Row] = []
    for section in SECTIONS:
        methods = [method for method in benchmark.methods if variant_section(method) == section]
        if methods and section != ZERO_SHOT_SECTION:  # whose only row has the same name
            rows.append(_row(section, *[""] * (len(columns) + 1), kind="section"))
        for method in methods:
            cells = [column[method] for column in cells_by_column]
            rows.append(_row(variant_title(method), *cells, _parameters(benchmark.runs(method, shots))))
            if paper and method in printed:
                reported = [*(printed[method][task] for task in benchmark.tasks), paper.average[shots][method]]
                millions = TRAINED_PARAMETERS.get(method)
                parameters = MISSING if millions is None else f"{millions:g} M"
                rows.append(_row("paper", *map(_format_printed, reported), parameters, kind="paper"))
    return Table(
        title=f"{benchmark.name}: {shots}-shot test {benchmark.metric} (%), {pluralize(num_seeds, 'seed')}",
        header=("method", *benchmark.tasks, AVERAGE_ROW, PARAMETERS_ROW),
        alignment="l" + "r" * (len(columns) + 1),
        rows=tuple(rows),
        notes=_notes(rows) + (_paper_notes(paper, shots) if paper and printed else ()),
    )


def framework_table(benchmark: Benchmark) -> Table | None:
    """Return the paper's Table 3, an ablation of MmAP on average over tasks; None without an MmAP variant."""
    methods = [method for method in FRAMEWORK if method in benchmark.methods]
    table_shots = [shots for shots in benchmark.shots if any(benchmark.runs(method, shots) for method in methods)]
    if not methods:
        return None
    paper = benchmark.paper
    marked = {shots: _marked_column(benchmark, methods, shots, None) for shots in table_shots}
    printed = {shots: paper.framework[shots] for shots in table_shots if paper and shots in paper.framework}
    header = ["variant", "task prompt", "group prompt", "groups"]
    for shots in table_shots:
        header += [pluralize(shots, "shot"), *(["paper"] if shots in printed else [])]
    rows = []
    for method in methods:
        variant = VARIANTS[method]
        single_task = variant.scope == "single-task"
        cells: list[str | Cell] = [
            "✓" if single_task or variant.method == "mmap" else "",
            "" if single_task else "✓",
            variant.scope,
        ]
        for shots in table_shots:
            cells += [marked[shots][method], *([f"{printed[shots][method]:.2f}"] if shots in printed else [])]
        rows.append(_row(variant_title(method), *cells))
    seeds = ", ".join(
        f"{pluralize(len(benchmark.seeds(shots)), 'seed')} at {pluralize(shots, 'shot')}" for shots in table_shots
    )
    return Table(
        title=f"{benchmark.name}: ablation of MmAP, test {benchmark.metric} (%) averaged over tasks, {seeds}",
        header=tuple(header),
        alignment="lccl" + "r" * (len(header) - 4),
        rows=tuple(rows),
        notes=_notes(rows) + (("paper: Table 3 of MmAP (AAAI 2024), CLIP ViT-B/16.",) if printed else ()),
    )


def comparison_table(benchmark: Benchmark) -> Table | None:
    """Return the average accuracy of `grouped` minus that of every other variant, paired by seed; None without it."""
    if OURS not in benchmark.methods:
        return None
    rows: list[Row] = []
    for shots in benchmark.shots:
        rows.append(_row(pluralize(shots, "shot"), "", "", "", "", kind="section"))
        ours = benchmark.accuracy_by_seed(OURS, shots)
        for method in sorted(benchmark.methods, key=lambda method: SECTIONS.index(variant_section(method))):
            if method != OURS:
                baseline = benchmark.accuracy_by_seed(method, shots)
                differences = [100 * (ours[seed] - baseline[seed]) for seed in ours if seed in baseline]
                rows.append(_row(variant_title(method), *_comparison(differences)))
    return Table(
        title=f"{benchmark.name}: {variant_title(OURS)} minus each other variant, average over tasks",
        header=("method", "difference", "standard error", "seeds better", "finding"),
        alignment="lrrrl",
        rows=tuple(rows),
        notes=(
            f"Differences in percentage points of {benchmark.metric}, between runs with the same seed.",
            "A finding needs a difference of more than two standard errors. With few seeds this is a weak test (the "
            "95 % quantile of Student's t is 4.3 for 3 seeds), not corrected for the number of rows.",
        ),
    )


def recommendations(benchmark: Benchmark) -> list[str]:
    """Return a `recommendation` for each number of shots at which all strategies but zero-shot CLIP have common seeds,
    at least two; standard errors are over these seeds."""
    from scipy.stats import t  # lazily: help imports this module

    sentences = []
    for shots in benchmark.shots:
        accuracies = {method: benchmark.accuracy_by_seed(method, shots) for method in benchmark.methods}
        if not accuracies.keys() >= set(DEFAULT_VARIANTS):
            continue
        seeds = set.intersection(*(set(accuracies[name]) for name in accuracies if name in STRATEGIES))
        if len(seeds) < 2:
            continue
        complete = {name: by_seed for name, by_seed in accuracies.items() if by_seed.keys() >= seeds}
        differences = {
            strategy: {
                name: _mean_difference([complete[strategy][seed] - by_seed[seed] for seed in seeds])
                for name, by_seed in complete.items()
                if name != strategy
            }
            for strategy in STRATEGIES
            if strategy in complete
        }
        sentence = recommendation(differences, None, float(t.ppf(QUANTILE, len(seeds) - 1)))
        sentences.append(f"{pluralize(shots, 'shot')}, ± over {pluralize(len(seeds), 'seed')}: {sentence}")
    return sentences


def _mean_difference(differences: Sequence[float]) -> Estimate:
    return Estimate(fmean(differences), stdev(differences) / sqrt(len(differences)))


def _comparison(differences: Sequence[float]) -> tuple[str, str, str, str]:
    """Return mean, standard error, number of better seeds, and finding."""
    if not differences:
        return MISSING, MISSING, MISSING, "no common seed"
    difference = fmean(differences)
    better = f"{sum(value > 0 for value in differences)} of {len(differences)}"
    text = f"{difference:+.2f}".replace("-", "−")
    if len(differences) == 1:
        return text, MISSING, better, "not testable (1 seed)"
    error = stdev(differences) / sqrt(len(differences))
    finding = "no difference" if abs(difference) <= 2 * error else "better" if difference > 0 else "worse"
    return text, f"{error:.2f}", better, finding


def _marked_column(benchmark: Benchmark, methods: Sequence[str], shots: int, task: str | None) -> dict[str, Cell]:
    """Return variant → cell, marking the best and second-best of the variants that have every seed."""
    num_seeds = len(benchmark.seeds(shots))
    values = {method: list(benchmark.accuracy_by_seed(method, shots, task).values()) for method in methods}
    complete = {method: f"{100 * fmean(seeds):.1f}" for method, seeds in values.items() if len(seeds) == num_seeds > 0}
    marks: tuple[Mark, ...] = ("best", "second")
    mark_by_value = dict(zip(sorted(set(complete.values()), key=float, reverse=True), marks))
    cells = {}
    for method, seeds in values.items():
        text = _mean_std(seeds)
        if 0 < len(seeds) < num_seeds:
            text += f" ({len(seeds)})"
        cells[method] = Cell(text, mark_by_value.get(complete.get(method, ""), ""))
    return cells


def _mean_std(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    return f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _format_printed(printed: Printed) -> str:
    return f"{printed.mean:.1f}" + ("" if printed.deviation is None else f" ± {printed.deviation:.1f}")


def _parameters(runs: Sequence[Result]) -> str:
    """Format the number of trained parameters, a range if the seeds' groupings differ in their number of groups."""
    counts = {run.trained_parameters for run in runs}
    return "–".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) if counts else MISSING


def _row(name: str, *values: str | Cell, kind: Literal["ours", "paper", "section"] = "ours") -> Row:
    return Row(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in (name, *values)), kind)


def _notes(rows: Iterable[Row]) -> tuple[str, ...]:
    texts = [cell.text for row in rows if row.kind == "ours" for cell in row.cells[1:]]
    notes = []
    if any("±" in text for text in texts):
        notes.append("±: sample standard deviation over seeds; for averages, that of the runs' averages.")
    if any(text.endswith(")") for text in texts):
        notes.append(
            "In brackets: the number of seeds if some are missing; such cells are not marked as best or second."
        )
    return tuple(notes)


def _paper_notes(paper: PaperResults, shots: int) -> tuple[str, ...]:
    inconsistent = ", ".join(
        f"{variant_title(method)} {printed:.1f} (mean of its tasks {task_mean:.1f})"
        for method, (printed, task_mean) in paper.inconsistent_averages(shots).items()
    )
    return (
        f"paper: as printed in {paper.table} of MmAP (AAAI 2024), {paper.data_set}, CLIP ViT-B/16, 3 seeds; the ± of "
        "an average is about the mean of its tasks' ±.",
        *([f"The paper's averages are inconsistent with its rows for: {inconsistent}."] if inconsistent else []),
    )


# --- writers --------------------------------------------------------------------------------------------


def to_markdown(table: Table) -> str:
    """Format as Markdown, best in bold, second-best in italics."""
    templates = {"": "{}", "best": "**{}**", "second": "*{}*"}
    rules = {"l": "---", "c": ":---:", "r": "---:"}

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [line(map(_markdown, table.header)), line(rules[side] for side in table.alignment)]
    for row in table.rows:
        name, *values = (templates[cell.mark].format(_markdown(cell.text)) for cell in row.cells)
        lines.append(line([f"**{name}**" if row.kind == "section" else name, *values]))
    notes = [f"- {_markdown(note)}" for note in table.notes]
    return "\n".join([f"### {_markdown(table.title)}", "", *lines, "", *notes, ""])


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def to_latex(table: Table) -> str:
    """Format as a tabular for the packages booktabs and amssymb, with title and notes as comments above it."""
    templates = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}
    lines = [f"% {' '.join(text.split())}" for text in (table.title, *table.notes)]
    lines += [rf"\begin{{tabular}}{{{table.alignment}}}", r"\toprule", _latex_line(map(_latex, table.header))]
    if not table.rows or table.rows[0].kind != "section":
        lines.append(r"\midrule")
    for row in table.rows:
        if row.kind == "section":
            text = _latex(row.cells[0].text)
            lines += [r"\midrule", rf"\multicolumn{{{len(table.header)}}}{{l}}{{\emph{{{text}}}}} \\"]
        else:
            name, *values = (templates[cell.mark].format(_latex(cell.text)) for cell in row.cells)
            lines.append(_latex_line([rf"\quad {name}" if row.kind == "paper" else name, *values]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


_LATEX = {character: "\\" + character for character in "_%&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "✓": r"$\checkmark$",
    "—": "---",
    "–": "--",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def to_rich(table: Table) -> rich.table.Table:
    """Format for the terminal: best in bold, second-best underlined, the paper's rows dim."""
    styles = {"": "", "best": "bold", "second": "underline"}
    terminal_table = rich.table.Table(
        title=Text(table.title), caption=Text("\n".join(table.notes)), caption_justify="left"
    )
    sides: dict[str, Literal["left", "center", "right"]] = {"l": "left", "c": "center", "r": "right"}
    for number, (header, side) in enumerate(zip(table.header, table.alignment)):
        terminal_table.add_column(Text(header), justify=sides[side], no_wrap=number == 0)
    for row in table.rows:
        if row.kind == "section":
            terminal_table.add_section()
        style = {"ours": "", "paper": "dim", "section": "italic"}[row.kind]
        indent = "  " if row.kind == "paper" else ""
        name, *values = row.cells
        terminal_table.add_row(
            Text(indent + name.text), *(Text(cell.text, styles[cell.mark]) for cell in values), style=style
        )
    return terminal_table


def to_csv(benchmark: Benchmark) -> str:
    """Return a line per run and task; accuracies or mAPs are 0 to 1 in full precision, empty where the paper has
    none."""
    paper = benchmark.paper
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("method", "title", "groups", "shots", "seed", "task")
        + (benchmark.metric, "trained_parameters", f"paper_{benchmark.metric}")
    )
    for run in benchmark.results:
        groups = "" if variant_section(run.method) in (ZERO_SHOT_SECTION, OTHER_SECTION) else VARIANTS[run.method].scope
        printed = paper.accuracy.get(run.shots, {}).get(run.method, {}) if paper else {}
        for task, accuracy in run.accuracy.items():
            paper_accuracy = (
                round(printed[task].mean / 100, 3) if task in printed else ""
            )  # printed with one decimal, in %
            writer.writerow(
                (run.method, variant_title(run.method), groups, run.shots, run.seed, task)
                + (accuracy, run.trained_parameters, paper_accuracy)
            )
    return text.getvalue()
