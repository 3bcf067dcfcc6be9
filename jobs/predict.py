#!/usr/bin/env python
"""Classifies a folder of images with trained prompts; needs the prompts file and the CLIP weights, no Ray.

    python jobs/predict.py --prompts mmap-runs/runs/<run>/prompts/grouped.safetensors --task ink photos/

Writes CSV: path, class, probability, error. A broken image gets an error instead of a class, and exit status 1.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.data.find import IMAGE_SUFFIXES, printable
from pipeline.data.images import BrokenImage, evaluation_pixels, read_image
from pipeline.errors import UserError, escaped
from pipeline.methods.classifier import Classifier
from pipeline.methods.prompt_file import load_prompts
from pipeline.training.evaluate import BATCH_SIZE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of images, searched at all depths, or one image")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="prompts/*.safetensors of a run")
    parser.add_argument("--task", help="task whose prompts to use; may be left out if the file has one only")
    parser.add_argument("--output", type=Path, metavar="CSV", help="where to write (default: standard output)")
    parser.add_argument("--pretrained", metavar="TAG_OR_FILE", help="CLIP weights, if not where they lay in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    try:
        return predict(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def predict(arguments: argparse.Namespace) -> int:
    prompts = load_prompts(arguments.prompts)
    tasks = list(prompts.words)
    task = arguments.task or (tasks[0] if len(tasks) == 1 else None)
    if task not in tasks:
        raise UserError(f"--task {task}: {arguments.prompts} has the tasks {', '.join(tasks)}")
    images = find_images(arguments.folder)
    classifier = prompts.classifier(arguments.device, arguments.pretrained)
    num_broken = 0
    stream = open(arguments.output, "w", newline="", encoding="utf-8") if arguments.output else sys.stdout
    writer = csv.writer(stream)
    writer.writerow(["path", "class", "probability", "error"])
    for start in range(0, len(images), BATCH_SIZE):
        for path, name, probability, error in classify(
            classifier, task, prompts.words[task], images[start : start + BATCH_SIZE]
        ):
            writer.writerow([printable(str(path)), name, probability, error])
            num_broken += bool(error)
        if sys.stderr.isatty():
            print(f"\r{min(start + BATCH_SIZE, len(images))} of {len(images)} images", end="", file=sys.stderr)
    if arguments.output:
        stream.close()
    if num_broken:
        print(f"{num_broken} of {len(images)} images are broken; see the column error", file=sys.stderr)
    return 1 if num_broken else 0


def find_images(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    images = sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )
    if not images:
        raise UserError(f"no images in {folder}")
    return images


def classify(
    classifier: Classifier, task: str, words: list[str], paths: list[Path]
) -> Iterator[tuple[Path, str, str, str]]:
    """(path, class, probability, error) of a batch of images, in order."""
    pixels, errors = {}, {}
    for path in paths:
        try:
            pixels[path] = torch.from_numpy(evaluation_pixels(read_image(path), classifier.towers.image_size))
        except (BrokenImage, OSError) as error:
            errors[path] = escaped(str(error))
    best = {}
    if pixels:
        probability, predicted = classifier.probabilities(task, torch.stack(list(pixels.values()))).max(dim=1)
        best = dict(zip(pixels, zip(predicted.tolist(), probability.tolist())))
    for path in paths:
        if path in errors:
            yield path, "", "", errors[path]
        else:
            label, probability = best[path]
            yield path, words[label], f"{probability:.4f}", ""


if __name__ == "__main__":
    sys.exit(main())
