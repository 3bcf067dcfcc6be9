"""Golden numbers in tests/golden/: reference results of whole runs.

    make golden

reruns the demo and a small comparison of all methods, prints differences beyond rounding, and stores the new numbers.
Use it only when numbers are meant to change, and raise RESULTS_VERSION in the same commit. All other changes must
reproduce the stored numbers, which tests/test_golden.py checks. A new method, which only adds numbers, also needs it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # sets the environment of tests
import pyarrow.parquet as pq
from pipelines import run_in_process, summary

from pipeline.data.parquet import SplitReader
from pipeline.methods.registry import DEFAULT_VARIANTS, VARIANTS
from pipeline.stages.plan import RESULTS_VERSION

FOLDER = Path(__file__).with_name("golden")
BASELINES = [name for name in VARIANTS if name != "zero_shot" and name not in DEFAULT_VARIANTS]


@dataclass(frozen=True)
class Tolerance:
    """Maximum differences from the stored numbers; all numbers without a tolerance must be equal."""

    losses: float
    test_losses: float
    mean_probability: float
    affinity: float
    """Relative to the largest affinity."""
    images: int
    """Maximum number of test images per task and training whose predicted class may differ: borderline cases."""


EXACT = Tolerance(losses=0, test_losses=0, mean_probability=0, affinity=0, images=0)


@dataclass(frozen=True)
class GoldenRun:
    name: str
    options: tuple[str, ...]
    """Options of jobs/full_pipeline.py."""
    tolerance: Tolerance

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.json"

    def stored(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())


# The summation order depends on the processor (AVX-512, AVX2, SSE; BLAS kernels), and training amplifies the
# differences. Largest differences of the stored numbers (AMD, AVX2) from those of an Intel with AVX-512, and of that
# with ATEN_CPU_CAPABILITY=default, ONEDNN_MAX_CPU_ISA=SSE41 and MKL_ENABLE_INSTRUCTIONS=SSE4_2:
#                losses    test losses   mean probability   affinity   labels
#   all methods  0.000017  0.000047      0.0000064          2.4e-6     none
#   demo         0.00014   0.000015      0.0000022          6.1e-6     none (1 on the AMD)
DEMO = GoldenRun("demo", (), Tolerance(losses=2e-3, test_losses=2e-4, mean_probability=1e-4, affinity=1e-5, images=1))
ALL_METHODS = GoldenRun(
    "all_methods",
    (
        *("--data.tasks", "[blur_left, blur_right, ink_right]"),
        *("--data.class_names", str(FOLDER / "class_names.txt")),
        *("--data.shots", "2", "--training.batch_size", "4", "--training.epochs", "2", "--global_prompt.epochs", "2"),
        *("--baselines", f"[{', '.join(BASELINES)}]", "--grouping.affinity", "gradient"),
        *("--grouping.objective", "mean"),
        # As these numbers were made; at the demo's rates, CLIP-SVD and 2SFS diverge in so few steps.
        *("--clip_svd.training.learning_rate", "0.01", "--two_stage.training.learning_rate", "0.01"),
        *("--tcp.training.learning_rate", "0.001", "--tip_adapter_f.training.learning_rate", "0.001"),
    ),
    Tolerance(losses=1e-4, test_losses=5e-4, mean_probability=2e-5, affinity=1e-5, images=1),
)
RUNS = {golden.name: golden for golden in (DEMO, ALL_METHODS)}


def training_folders(storage: Path) -> dict[str, Path]:
    """Map method and tasks of each training (`coop: blur_right + ink_right`) to its artifact."""
    folders = {"global prompt": next(storage.glob("global_prompt/[!.]*"))}
    for folder in storage.glob("group_trainings/[!.]*"):
        inputs = json.loads((folder / "artifact.json").read_text())["inputs"]
        name = f"{inputs['method']}: {' + '.join(inputs['group'])}"
        assert name not in folders, f"two trainings of {name}"
        folders[name] = folder
    return dict(sorted(folders.items()))


def read_numbers(storage: Path) -> dict[str, Any]:
    """Read the numbers of the only run in a storage, in the form that is stored."""
    report = summary(storage)
    grouping = json.loads(next(storage.glob("grouping/[!.]*/grouping.json")).read_text())
    return _round_floats(
        {
            "results_version": RESULTS_VERSION,
            "splits": _splits(SplitReader(next(storage.glob("splits/[!.]*")))),
            "groups": grouping["groups"],
            "affinity": grouping["affinity"],
            "methods": report["methods"],
            "trainings": {name: _training(folder) for name, folder in training_folders(storage).items()},
        }
    )


def _splits(reader: SplitReader) -> dict[str, Any]:
    """Digest content and order, but not the files: their compression depends on the version of pyarrow."""
    digests: dict[str, Any] = {}
    for split in ("train", "test"):
        for task in reader.description.tasks:
            digest = hashlib.sha256()
            for row in reader.rows(split, task, ("path", "label", "class_name", "image")):
                image = hashlib.sha256(row["image"]).hexdigest()
                digest.update(f"{row['path']}\t{row['label']}\t{row['class_name']}\t{image}\n".encode())
            digests[f"{split} {task}"] = {
                "images": reader.description.counts[split][task],
                "digest": digest.hexdigest()[:16],
            }
    return digests


def _training(folder: Path) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    if (folder / "history.parquet").exists():  # zero-shot CLIP and merged methods have none
        history = pq.read_table(folder / "history.parquet").to_pandas()
        numbers["tasks"] = list(dict.fromkeys(history["task"]))
        numbers["learning_rate"] = history.groupby("step")["learning_rate"].first().tolist()
        losses = history.pivot(index="step", columns="task", values="loss")
        rows = losses[numbers["tasks"]].to_numpy().tolist()
        # A step without an image of the task has no loss.
        numbers["losses"] = [[None if math.isnan(loss) else loss for loss in row] for row in rows]
    if (folder / "predictions.parquet").exists():  # the global prompt has none
        predictions = pq.read_table(folder / "predictions.parquet").to_pandas()
        numbers["predictions"] = {
            task: {
                "accuracy": float((rows["label"] == rows["predicted"]).mean()),
                "mean_probability": float(rows["probability"].mean()),
                "labels": "".join(map(str, rows["predicted"])),
            }
            for task, rows in predictions.groupby("task", sort=False)
        }
    return numbers


def _round_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _round_floats(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_round_floats(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def format_json(value: Any) -> str:
    """Format JSON with one line per list of scalars, so that a diff shows the step or the task that changed; without
    indentation, which would be an eighth of the file."""
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(name)}: {format_json(item)}" for name, item in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + ",\n".join(map(format_json, value)) + "\n]"
    return json.dumps(value)


def differences(stored: dict[str, Any], fresh: dict[str, Any], tolerance: Tolerance = EXACT) -> list[str]:
    """Return a line per training that differs by more than the tolerance, with the largest difference of each kind."""
    old_values, new_values = dict(_leaves(stored)), dict(_leaves(fresh))
    old_parts, new_parts = ({path[:2] for path in values} for values in (old_values, new_values))
    lines: dict[tuple, str] = {}
    largest: dict[tuple, dict[Any, float]] = defaultdict(dict)
    texts: dict[tuple, dict[Any, str]] = defaultdict(dict)
    for path in old_values | new_values:
        part, kind = path[:2], next((name for name in reversed(path[2:]) if isinstance(name, str)), None)
        old, new = old_values.get(path), new_values.get(path)
        distance = _distance(old, new)
        if part not in old_parts or part not in new_parts:
            lines[part] = "new" if part in new_parts else "missing"
        elif distance > _max_distance(path, tolerance, stored) and distance > largest[part].get(kind, 0):
            largest[part][kind] = distance
            texts[part][kind] = _format_difference(path[2:], old, new, distance)
    lines |= {part: "; ".join(kinds.values()) for part, kinds in texts.items()}
    return [f"{_format_path(part)}: {text}" for part, text in lines.items()]


def _format_difference(path: tuple, old: Any, new: Any, distance: float) -> str:
    if path[-1:] == ("labels",):
        return f"{_format_path(path)} of {distance} images"
    return f"{_format_path(path)} {old} -> {new}".strip() + (f" ({distance:.2g})" if math.isfinite(distance) else "")


def _format_path(path: tuple) -> str:
    """Format a path; positions in lists, such as steps and tasks, count from 1."""
    return " ".join(str(part + 1 if isinstance(part, int) else part) for part in path)


def _leaves(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yield (path, value) of all scalars in nested mappings and lists."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def _distance(old: Any, new: Any) -> float:
    """Return the absolute difference of two values; of predicted labels, the number of differing images."""
    if old == new:
        return 0
    if isinstance(old, str) and isinstance(new, str) and len(old) == len(new) and (old + new).isdigit():
        return sum(a != b for a, b in zip(old, new))
    if isinstance(old, int | float) and isinstance(new, int | float) and math.isfinite(new):
        return abs(new - old)
    return math.inf


def _max_distance(path: tuple, tolerance: Tolerance, stored: dict[str, Any]) -> float:
    num_images = min(split["images"] for name, split in stored["splits"].items() if name.startswith("test"))
    if path[0] == "affinity":
        return tolerance.affinity * max(abs(value) for row in stored["affinity"] for value in row)
    if path[-1] == "labels":
        return tolerance.images
    if "accuracy" in path or path[-1] == "average":
        return tolerance.images / num_images * (1 + 1e-6)
    if path[-1] == "average_standard_error" or "standard_error" in path:  # of accuracies from 5 to 95 %
        return 2 * tolerance.images / num_images**1.5
    if "test_loss" in path or path[-1] == "average_test_loss":
        return tolerance.test_losses
    kind = next((part for part in path if part in ("losses", "mean_probability")), None)
    return getattr(tolerance, kind) if kind else 0


def run_pipeline(golden: GoldenRun, storage: Path) -> str:
    """Run the pipeline in this process; return its output."""
    finished = run_in_process("full_pipeline", "--storage", storage, *golden.options)
    assert finished.status == 0, finished.output
    return finished.output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="print the differences, but store nothing")
    parser.add_argument("--exact", action="store_true", help="compare without tolerance for rounding")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"runs to compare: {', '.join(RUNS)} (default: all)")
    arguments = parser.parse_args()
    for name in arguments.runs or RUNS:
        print(f"{name}: running", flush=True)
        golden = RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            run_pipeline(golden, Path(folder) / "storage")
            fresh = read_numbers(Path(folder) / "storage")
        stored = golden.stored() if golden.file.exists() else {"results_version": None}
        changed = differences(stored, fresh, EXACT if arguments.exact else golden.tolerance)
        print("\n".join(f"  {line}" for line in changed) or "  no differences")
        if changed and stored["results_version"] == fresh["results_version"]:
            print(f"  RESULTS_VERSION is still {RESULTS_VERSION}: raise it if numbers changed")
        if changed and not arguments.check:
            golden.file.write_text(format_json(fresh) + "\n")


if __name__ == "__main__":
    main()
