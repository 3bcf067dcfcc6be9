#!/usr/bin/env python
"""Everything that only a GPU can tell, in one run of a few minutes, without Ray and MLflow.

    python benchmarks/gpu.py                                                    ViT-B/16, within 8 minutes
    python benchmarks/gpu.py --maple ../multimodal-prompt-learning --coop ../CoOp       also the authors' code
    python benchmarks/gpu.py --device cpu --model ViT-B-32 --minutes 3          try it out

- step time: ours, the plain version and the authors' code (step_time.py), in float32 and bfloat16;
- utilization: fraction of the device's measured peak in training and evaluation (utilization.py), in all precisions;
- pipeline: four tasks of 65 classes, as Office-Home, on generated JPEGs, from the files to the accuracies of groups
  (single_process.py);
- training as a CUDA graph, and as compiled by torch.compile, with what the first call takes.

Each part has a share of the time. When it is over, the measurement at work ends and no other of the part begins. What
was left out, and why, is in the output and in the result file, which is written after every measurement. A measurement
that fails is left out with its error. A precision that the device multiplies ten times slower than float32 is left out,
as it is not meant for it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import step_time
import torch
import utilization
from common import PRECISIONS, class_names, default_device, device_name, load, release_memory, table, write_results
from input_speed import write_photo
from official_peers import add_peer_options, given_checkouts
from single_process import STAGES, run_in_one_process

from pipeline.clip.load import load_clip
from pipeline.config import parse_config
from pipeline.cpus import usable_cpus

PARTS = {"step_time": 4, "utilization": 1, "pipeline": 1, "variants": 2}
"""Part → weight of its share of the time; what a part leaves is for the next ones."""
CASES = ("1x4x65", "1x16x65", "1x4x126")
TASKS = ("Art", "Clipart", "Product", "Real World")


class OutOfTime(BaseException):
    """The time is over; no Exception, so that no library catches it."""


class Session:
    """Results and time of a run."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.device = arguments, torch.device(arguments.device)
        self.end = self.deadline = time.monotonic() + 60 * arguments.minutes
        self.left_out: dict[str, str] = {}
        """Measurement → why it was left out."""
        self.results: dict[str, Any] = {"step_time": [], "utilization": [], "pipeline": {}, "variants": []}
        signal.signal(signal.SIGALRM, self._end_measurement)

    def _end_measurement(self, *_: object) -> None:
        raise OutOfTime(f"no time left in its share of {self.arguments.minutes:g} minutes")

    def measure(self, name: str, work: Callable[[], None]) -> None:
        """Do the work, if time is left, until the time is over, and record why it was left out, if it was; then write
        the results and release the memory."""
        start = time.monotonic()
        try:
            if start >= self.deadline:
                self._end_measurement()
            signal.setitimer(signal.ITIMER_REAL, self.deadline - start)
            work()
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        except (Exception, OutOfTime) as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.left_out[name] = str(error) if isinstance(error, OutOfTime) else f"{type(error).__name__}: {error}"
            print(f"{name}: left out: {self.left_out[name]}", file=sys.stderr, flush=True)
        self.write()
        release_memory()

    def write(self) -> None:
        values = {**vars(self.arguments), **self.results, "left_out": self.left_out}
        checkouts_as_text = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        write_results(f"gpu_{self.arguments.model}", self.device, checkouts_as_text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip model name")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8, help="time for all measurements")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each; the median counts")
    parser.add_argument("--cases", nargs="+", default=CASES, help="cases of the step time")
    parser.add_argument("--images", type=int, default=64, help="images of a training step, of 4 tasks")
    parser.add_argument("--evaluated", type=int, default=128, help="images of an evaluation batch")
    parser.add_argument("--classes", type=int, default=65, help="classes of each task, except in the cases")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each training of the pipeline")
    parser.add_argument("--images-per-class", type=int, default=2, help="of each task; one is for training")
    add_peer_options(parser)
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    checkouts, session = given_checkouts(arguments), Session(arguments)

    peaks = {name: utilization.matmul_tflops(session.device, name) for name in PRECISIONS}
    slow = [name for name in peaks if peaks[name] < peaks["float32"] / 10]
    for name in slow:
        session.left_out[name] = f"the device multiplies at {peaks[name] / peaks['float32']:.3f} of its float32 speed"
    precisions = [name for name in utilization.device_precisions(session.device) if name not in slow]
    measure_part = {
        "step_time": partial(measure_step_time, session, checkouts, [name for name in PRECISIONS if name not in slow]),
        "utilization": partial(measure_utilization, session, precisions),
        "pipeline": partial(measure_pipeline, session),
        "variants": partial(measure_variants, session, precisions[-1]),
    }
    weights = {part: weight for part, weight in PARTS.items() if part in arguments.parts}
    while weights:
        part, time_now = next(iter(weights)), time.monotonic()
        session.deadline = time_now + (session.end - time_now) * weights[part] / sum(weights.values())
        measure_part[part]()
        del weights[part]
    print_results(session)


def measure_step_time(session: Session, checkouts: dict[str, Path], precisions: list[str]) -> None:
    arguments, models = session.arguments, {}

    def measure(case: str) -> None:
        if not models:
            models.update({name: load(arguments.model, session.device, name) for name in precisions})
        session.results["step_time"] += step_time.measure_case(case, models, checkouts, arguments.repeats)

    for case in arguments.cases:
        session.measure(f"step time {case}", partial(measure, case))


def measure_utilization(session: Session, precisions: list[str]) -> None:
    reference: list[torch.Tensor] = []

    def measure(precision: str) -> None:
        rows, gradients = utilization.measure(utilization_setting(session), precision, reference=reference or None)
        session.results["utilization"] += rows
        reference[:] = reference or gradients

    for precision in precisions:
        session.measure(f"utilization {precision}", partial(measure, precision))


def measure_variants(session: Session, precision: str) -> None:
    """Measure each variant beside the plain training step, in the precision that is used on this device."""

    def measure(variant: str) -> None:
        if variant == utilization.CUDA_GRAPH and session.device.type != "cuda":
            raise RuntimeError("needs a GPU")
        rows, _ = utilization.measure(utilization_setting(session), precision, [variant])
        session.results["variants"] += [row for row in rows if row["what"] != "evaluation"]

    for variant in (utilization.CUDA_GRAPH, utilization.COMPILED):  # compiling takes longest
        session.measure(f"{variant} {precision}", partial(measure, variant))


def utilization_setting(session: Session) -> utilization.Setting:
    arguments = session.arguments
    options = (arguments.model, arguments.images, arguments.evaluated, arguments.classes, arguments.repeats)
    return utilization.Setting(*options, session.device)


def measure_pipeline(session: Session) -> None:
    arguments, seconds = session.arguments, {}
    session.results["pipeline"] = {"seconds": seconds}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.monotonic() - start

    def measure() -> None:
        training = {"epochs": arguments.epochs, "batch_size": 4}
        clip = {"model": arguments.model, "pretrained": None}
        config = parse_config({"clip": clip, "training": training, "data": {"shots": 1}, "seed": 1})
        threads, _ = usable_cpus()
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "images"
            write_images(root, arguments.classes, arguments.images_per_class)
            accuracies = run_in_one_process(config, root, Path(folder), arguments.device, threads, stage)
        # Weights are random, so accuracies say nothing; but all tasks must have been evaluated.
        assert sorted(accuracies["grouped"]) == sorted(TASKS)

    session.measure("pipeline", measure)
    if reason := session.left_out.pop("pipeline", None):
        session.left_out |= {f"pipeline: {name}": reason for name in STAGES if name not in seconds}
        session.write()
    load_clip.cache_clear()
    release_memory()


def write_images(root: Path, num_classes: int, images_per_class: int) -> None:
    paths = [
        root / task / name / f"{number}.jpg"
        for task in TASKS
        for name in class_names(num_classes)
        for number in range(images_per_class)
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda numbered: write_photo(numbered[1], numbered[0], 300, 240), enumerate(paths)))


def print_results(session: Session) -> None:
    results, arguments = session.results, session.arguments
    texts = [f"{arguments.model}, {device_name(session.device)}, torch {torch.__version__}"]
    texts += step_time.time_tables(results["step_time"]) if results["step_time"] else []
    texts += [utilization.rows_table(results[part]) for part in ("utilization", "variants") if results[part]]
    if seconds := results["pipeline"].get("seconds"):
        texts.append(table(["pipeline", "s"], [[name, f"{value:.2f}"] for name, value in seconds.items()]))
    if session.left_out:
        texts.append("\n".join(["Left out:", *(f"- {name}: {reason}" for name, reason in session.left_out.items())]))
    print("\n\n".join(texts))


if __name__ == "__main__":
    main()
