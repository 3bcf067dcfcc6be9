"""Tables of a benchmark: several versions, numbers of shots and seeds on one data set, with the paper's beside them.

What this module chose:
- A cell is the mean over seeds in %, ± the sample standard deviation where there are two seeds or more. An average is
  taken over the tasks of one run first, and its mean and deviation then over the runs.
- A cell that lacks seeds says how many it has, and is never marked as best. What was not run at all is a dash.
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
from pipeline.methods.registry import VARIANTS
from pipeline.report.paper_results import TRAINED_PARAMETERS, PaperResults, Printed, paper_results_for
from pipeline.report.summary import AVERAGE_ROW, PARAMETERS_ROW, title

ZERO_SHOT, OURS = "zero_shot", "grouped"
FRAMEWORK = ("mmap_task_only", "mmap_group_only", "mmap_random_groups", "all_in_one", "grouped")
SECTIONS = ZERO_SHOT_SECTION, EACH_TASK, ALL_TASKS, OTHERS = "zero-shot", "each task for itself", "all tasks", "others"
MISSING = "—"

# --- what is shown --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One run of a version. `accuracy`: task → 0 to 1; a task that is not in it was not measured."""

    method: str
    shots: int
    seed: int
    accuracy: dict[str, float]
    trained_parameters: int


@dataclass(frozen=True)
class Benchmark:
    """Versions stand in the order in which `results` first names them."""

    name: str
    tasks: tuple[str, ...]
    results: tuple[Result, ...]
    clip: str
    protocol: tuple[str, ...] = ()
    """How the methods were trained, a sentence each."""

    def __post_init__(self) -> None:
        """Raises: ValueError: two results for one run, an unknown task, or accuracies that are not from 0 to 1."""
        runs = Counter((result.method, result.shots, result.seed) for result in self.results)
        for (method, shots, seed), number in runs.items():
            if number > 1:
                raise ValueError(f"{number} results for {method} with {shots} shots and seed {seed}; give one")
        for result in self.results:
            for task, value in result.accuracy.items():
                if task not in self.tasks:
                    raise ValueError(f"{result.method}: task {task!r} is not one of {', '.join(self.tasks)}")
                if not 0 <= value <= 1:
                    raise ValueError(f"{result.method}, {task}: accuracy {value} is not between 0 and 1")

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

    def by_seed(self, method: str, shots: int, task: str | None = None) -> dict[int, float]:
        """Seed → accuracy (0 to 1) of a task; without one, the plain mean over tasks of each run that has them all."""
        runs = self.runs(method, shots)
        if task is not None:
            return {run.seed: run.accuracy[task] for run in runs if task in run.accuracy}
        return {run.seed: fmean(run.accuracy.values()) for run in runs if len(run.accuracy) == len(self.tasks)}


def version_title(method: str) -> str:
    """`summary.title`, but a name that VARIANTS lacks stays as it is."""
    return title(method) if method in VARIANTS else method


def section_of(method: str) -> str:
    """One of SECTIONS: whether a task's training has seen other tasks, be it in what it starts from."""
    if method == ZERO_SHOT:
        return ZERO_SHOT_SECTION
    if method not in VARIANTS:
        return OTHERS
    variant = VARIANTS[method]
    return EACH_TASK if variant.scope == "single-task" and variant.init_from is None else ALL_TASKS


# --- tables ---------------------------------------------------------------------------------------------


Mark = Literal["", "best", "second"]


@dataclass(frozen=True)
class Cell:
    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Row:
    """`kind`: of a "section", only the first cell is filled; "paper" belongs to the row above it."""

    cells: tuple[Cell, ...]
    kind: Literal["ours", "paper", "section"] = "ours"


@dataclass(frozen=True)
class Table:
    """`alignment`: l, c or r for each column."""

    title: str
    header: tuple[str, ...]
    alignment: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def main_tables(benchmark: Benchmark) -> list[Table]:
    """The paper's Tables 1 and 2, one for each number of shots: a version a row, a task a column."""
    paper = paper_results_for(benchmark.tasks)
    return [_main_table(benchmark, shots, paper) for shots in benchmark.shots]


def _main_table(benchmark: Benchmark, shots: int, paper: PaperResults | None) -> Table:
    columns = (*benchmark.tasks, None)
    num_seeds = len(benchmark.seeds(shots))
    marked = [_marked_column(benchmark, benchmark.methods, shots, task) for task in columns]
    printed = paper.accuracy.get(shots, {}) if paper else {}
    rows: list[Row] = []
    for section in SECTIONS:
        methods = [method for method in benchmark.methods if section_of(method) == section]
        if methods and section != ZERO_SHOT_SECTION:  # its one row says the same
            rows.append(_row(section, *[""] * (len(columns) + 1), kind="section"))
        for method in methods:
            cells = [column[method] for column in marked]
            rows.append(_row(version_title(method), *cells, _parameters(benchmark.runs(method, shots))))
            if paper and method in printed:
                figures = [*(printed[method][task] for task in benchmark.tasks), paper.average[shots][method]]
                millions = TRAINED_PARAMETERS.get(method)
                parameters = MISSING if millions is None else f"{millions:g} M"
                rows.append(_row("paper", *map(_printed, figures), parameters, kind="paper"))
    return Table(
        title=f"{benchmark.name}: {shots}-shot test accuracy (%), {pluralize(num_seeds, 'seed')}",
        header=("method", *benchmark.tasks, AVERAGE_ROW, PARAMETERS_ROW),
        alignment="l" + "r" * (len(columns) + 1),
        rows=tuple(rows),
        notes=_notes(rows) + (_paper_notes(paper, shots) if paper and printed else ()),
    )


def framework_table(benchmark: Benchmark) -> Table | None:
    """The paper's Table 3: what each part of MmAP is worth, on average over tasks; None without an MmAP version."""
    methods = [method for method in FRAMEWORK if method in benchmark.methods]
    shots_shown = [shots for shots in benchmark.shots if any(benchmark.runs(method, shots) for method in methods)]
    if not methods:
        return None
    paper = paper_results_for(benchmark.tasks)
    marked = {shots: _marked_column(benchmark, methods, shots, None) for shots in shots_shown}
    printed = {shots: paper.framework[shots] for shots in shots_shown if paper and shots in paper.framework}
    header = ["version", "task prompt", "group prompt", "groups"]
    for shots in shots_shown:
        header += [pluralize(shots, "shot"), *(["paper"] if shots in printed else [])]
    rows = []
    for method in methods:
        variant = VARIANTS[method]
        alone = variant.scope == "single-task"
        cells: list[str | Cell] = [
            "✓" if alone or variant.method == "mmap" else "",
            "" if alone else "✓",
            variant.scope,
        ]
        for shots in shots_shown:
            cells += [marked[shots][method], *([f"{printed[shots][method]:.2f}"] if shots in printed else [])]
        rows.append(_row(version_title(method), *cells))
    seeds = ", ".join(
        f"{pluralize(len(benchmark.seeds(shots)), 'seed')} at {pluralize(shots, 'shot')}" for shots in shots_shown
    )
    return Table(
        title=f"{benchmark.name}: parts of MmAP, average test accuracy over tasks in %, {seeds}",
        header=tuple(header),
        alignment="lccl" + "r" * (len(header) - 4),
        rows=tuple(rows),
        notes=_notes(rows) + (("paper: Table 3 of MmAP (AAAI 2024), CLIP ViT-B/16.",) if printed else ()),
    )


def comparison_table(benchmark: Benchmark) -> Table | None:
    """`grouped` minus every other version: average accuracy over tasks, paired by seed; None without `grouped`."""
    if OURS not in benchmark.methods:
        return None
    rows: list[Row] = []
    for shots in benchmark.shots:
        rows.append(_row(pluralize(shots, "shot"), "", "", "", "", kind="section"))
        ours = benchmark.by_seed(OURS, shots)
        for method in sorted(benchmark.methods, key=lambda method: SECTIONS.index(section_of(method))):
            if method != OURS:
                theirs = benchmark.by_seed(method, shots)
                differences = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
                rows.append(_row(version_title(method), *_comparison(differences)))
    return Table(
        title=f"{benchmark.name}: {version_title(OURS)} minus each other version, average over tasks",
        header=("method", "difference", "standard error", "seeds better", "finding"),
        alignment="lrrrl",
        rows=tuple(rows),
        notes=(
            "Differences in percentage points of accuracy, between runs of the same seed.",
            "A difference is called one where it is more than two standard errors. With few seeds that is a weak test "
            "(the 95 % quantile of Student's t is 4.3 for 3 seeds), and it is made once for each row.",
        ),
    )


def _comparison(differences: Sequence[float]) -> tuple[str, str, str, str]:
    """Mean, standard error, seeds better, finding."""
    if not differences:
        return MISSING, MISSING, MISSING, "no seed in common"
    difference = fmean(differences)
    better = f"{sum(value > 0 for value in differences)} of {len(differences)}"
    shown = f"{difference:+.2f}".replace("-", "−")
    if len(differences) == 1:
        return shown, MISSING, better, "one seed: cannot be told"
    error = stdev(differences) / sqrt(len(differences))
    finding = "no difference seen" if abs(difference) <= 2 * error else "better" if difference > 0 else "worse"
    return shown, f"{error:.2f}", better, finding


def _marked_column(benchmark: Benchmark, methods: Sequence[str], shots: int, task: str | None) -> dict[str, Cell]:
    """Version → its cell; best and second-best among the versions that have every seed."""
    num_seeds = len(benchmark.seeds(shots))
    values = {method: list(benchmark.by_seed(method, shots, task).values()) for method in methods}
    complete = {method: f"{100 * fmean(each):.1f}" for method, each in values.items() if len(each) == num_seeds > 0}
    marks: tuple[Mark, ...] = ("best", "second")
    places = dict(zip(sorted(set(complete.values()), key=float, reverse=True), marks))
    cells = {}
    for method, each in values.items():
        text = _spread(each)
        if 0 < len(each) < num_seeds:
            text += f" ({len(each)})"
        cells[method] = Cell(text, places.get(complete.get(method, ""), ""))
    return cells


def _spread(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    return f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _printed(figure: Printed) -> str:
    return f"{figure.mean:.1f}" + ("" if figure.deviation is None else f" ± {figure.deviation:.1f}")


def _parameters(runs: Sequence[Result]) -> str:
    """A range where the seeds' groupings differ in their number of groups."""
    numbers = {run.trained_parameters for run in runs}
    return "–".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)})) if numbers else MISSING


def _row(first: str, *others: str | Cell, kind: Literal["ours", "paper", "section"] = "ours") -> Row:
    return Row(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in (first, *others)), kind)


def _notes(rows: Iterable[Row]) -> tuple[str, ...]:
    texts = [cell.text for row in rows if row.kind == "ours" for cell in row.cells[1:]]
    notes = []
    if any("±" in text for text in texts):
        notes.append("±: sample standard deviation over seeds; of an average, that of the runs' averages.")
    if any(text.endswith(")") for text in texts):
        notes.append("In brackets: over only that many seeds, so not marked as best or second.")
    return tuple(notes)


def _paper_notes(paper: PaperResults, shots: int) -> tuple[str, ...]:
    wrong = ", ".join(
        f"{version_title(method)} {printed:.1f} (mean of its tasks {mean_of_tasks:.1f})"
        for method, (printed, mean_of_tasks) in paper.disagreeing_averages(shots).items()
    )
    return (
        f"paper: as printed in {paper.table} of MmAP (AAAI 2024), {paper.data_set}, CLIP ViT-B/16, 3 seeds; the ± of "
        "an average is about the mean of its tasks' ±.",
        *([f"Averages of the paper that do not fit its own rows: {wrong}."] if wrong else []),
    )


# --- writers --------------------------------------------------------------------------------------------


def to_markdown(table: Table) -> str:
    """Best in bold, second-best in italics."""
    around = {"": "{}", "best": "**{}**", "second": "*{}*"}
    rules = {"l": "---", "c": ":---:", "r": "---:"}

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [line(map(_markdown, table.header)), line(rules[side] for side in table.alignment)]
    for row in table.rows:
        first, *others = (around[cell.mark].format(_markdown(cell.text)) for cell in row.cells)
        lines.append(line([f"**{first}**" if row.kind == "section" else first, *others]))
    notes = [f"- {_markdown(note)}" for note in table.notes]
    return "\n".join([f"### {_markdown(table.title)}", "", *lines, "", *notes, ""])


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def to_latex(table: Table) -> str:
    """A tabular environment for the packages booktabs and amssymb; title and notes are comments above it."""
    around = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}
    lines = [f"% {' '.join(text.split())}" for text in (table.title, *table.notes)]
    lines += [rf"\begin{{tabular}}{{{table.alignment}}}", r"\toprule", _latex_line(map(_latex, table.header))]
    if not table.rows or table.rows[0].kind != "section":
        lines.append(r"\midrule")
    for row in table.rows:
        if row.kind == "section":
            text = _latex(row.cells[0].text)
            lines += [r"\midrule", rf"\multicolumn{{{len(table.header)}}}{{l}}{{\emph{{{text}}}}} \\"]
        else:
            first, *others = (around[cell.mark].format(_latex(cell.text)) for cell in row.cells)
            lines.append(_latex_line([rf"\quad {first}" if row.kind == "paper" else first, *others]))
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
    """For the terminal: best in bold, second-best underlined, the paper's rows dim."""
    styles = {"": "", "best": "bold", "second": "underline"}
    shown = rich.table.Table(title=Text(table.title), caption=Text("\n".join(table.notes)), caption_justify="left")
    sides: dict[str, Literal["left", "center", "right"]] = {"l": "left", "c": "center", "r": "right"}
    for number, (name, side) in enumerate(zip(table.header, table.alignment)):
        shown.add_column(Text(name), justify=sides[side], no_wrap=number == 0)
    for row in table.rows:
        if row.kind == "section":
            shown.add_section()
        style = {"ours": "", "paper": "dim", "section": "italic"}[row.kind]
        indent = "  " if row.kind == "paper" else ""
        first, *others = row.cells
        shown.add_row(Text(indent + first.text), *(Text(cell.text, styles[cell.mark]) for cell in others), style=style)
    return shown


def to_csv(benchmark: Benchmark) -> str:
    """A line for each run and task; accuracies from 0 to 1 in full precision, empty where the paper has none."""
    paper = paper_results_for(benchmark.tasks)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("method", "title", "groups", "shots", "seed", "task", "accuracy", "trained_parameters", "paper_accuracy")
    )
    for run in benchmark.results:
        groups = "" if section_of(run.method) in (ZERO_SHOT_SECTION, OTHERS) else VARIANTS[run.method].scope
        printed = paper.accuracy.get(run.shots, {}).get(run.method, {}) if paper else {}
        for task, accuracy in run.accuracy.items():
            of_paper = round(printed[task].mean / 100, 3) if task in printed else ""  # printed with one decimal, in %
            writer.writerow(
                (run.method, version_title(run.method), groups, run.shots, run.seed, task)
                + (accuracy, run.trained_parameters, of_paper)
            )
    return text.getvalue()
