"""The demo's data set: handwritten digits, rendered in six visual domains.

    python -m pipeline.demo.digits FOLDER      writes FOLDER/<domain>/<class>/*.png

The 8x8 digits of scikit-learn are partitioned, class by class, into the tiny CLIP's training set and the six domains,
so that no digit is used twice. Three domains are dark on light (ink, noise, rotated) and three light on dark (chalk,
neon, outline): similar tasks that task grouping can find.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.files import atomic_replace

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 32
IMAGES_PER_CLASS = 22
CLIP_IMAGES_PER_CLASS = 42
SEED = 20240
MODIFIED_S = 946_684_800
"""Modification time of the files, the same on all machines: the data set's fingerprint includes it."""


def ink(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blue-black ink on cream paper with a faint grain."""
    paper = np.array([0.96, 0.93, 0.84]) + rng.normal(0, 0.02, (SIZE, SIZE, 1))
    return _blend(paper, np.array([0.08, 0.10, 0.28]), stroke)


def noise(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink on paper with strong sensor noise."""
    return ink(stroke, rng) + rng.normal(0, 0.45, (SIZE, SIZE, 3))


def rotated(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink on paper, rotated clockwise by 40 to 55 degrees."""
    from scipy import ndimage  # lazily: every worker imports this module, and few draw digits

    turned = ndimage.rotate(stroke, -rng.uniform(40, 55), reshape=False, order=1)
    return ink(turned, rng)


def chalk(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grainy white chalk on a dark green board."""
    board = np.array([0.10, 0.24, 0.17]) + rng.normal(0, 0.03, (SIZE, SIZE, 1))
    return _blend(board, np.array([0.93, 0.93, 0.88]), stroke * rng.uniform(0.45, 1.0, (SIZE, SIZE)))


def neon(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Glowing neon tube of a random hue on near black."""
    from scipy import ndimage

    hue = rng.permutation([1.0, rng.uniform(0.2, 0.9), 0.1])
    glow = np.clip(stroke + 0.8 * ndimage.gaussian_filter(stroke, 2.0), 0, 1)
    return _blend(np.full((SIZE, SIZE, 3), 0.03), hue, glow)


def outline(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contour of the stroke, a pale line on a dark blueprint."""
    from scipy import ndimage

    contour = ndimage.morphological_gradient(stroke, size=(3, 3))
    blueprint = np.array([0.08, 0.16, 0.42]) + rng.normal(0, 0.02, (SIZE, SIZE, 1))
    return _blend(blueprint, np.array([0.85, 0.92, 1.0]), contour)


DOMAINS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "ink": ink,
    "noise": noise,
    "rotated": rotated,
    "chalk": chalk,
    "neon": neon,
    "outline": outline,
}


def split_base_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Split the base digits: domain, or "clip" → indices (classes, images), all disjoint."""
    rng = np.random.default_rng(SEED)
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(len(CLASSES))]
    sizes = {"clip": CLIP_IMAGES_PER_CLASS, **dict.fromkeys(DOMAINS, IMAGES_PER_CLASS)}
    ends = np.cumsum(list(sizes.values()))
    return {
        name: np.stack([indices[end - size : end] for indices in shuffled])
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }


def strokes(images: np.ndarray) -> np.ndarray:
    """Convert base digits (n, 8, 8) in 0..16 to stroke coverage (n, 32, 32) in 0..1."""
    scaled = [
        Image.fromarray((image * (255 / 16)).astype(np.uint8)).resize((24, 24), Image.Resampling.BICUBIC)
        for image in images
    ]
    coverage = np.stack([np.asarray(image, dtype=np.float64) for image in scaled]) / 255
    return np.pad(np.clip(1.6 * coverage - 0.3, 0, 1), ((0, 0), (4, 4), (4, 4)))


def write_digits(root: Path) -> None:
    """Write the data set as <root>/<domain>/<class>/<nnnn>.png, 32x32 RGB; a complete set is kept.

    Raises:
        OSError: root contains something else.
    """
    root = Path(root)
    if _is_complete(root):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_replace(root) as partial:
            _write(partial)
    except OSError:
        if not _is_complete(root):  # another process may have written the same bytes
            raise


def _is_complete(root: Path) -> bool:
    images = sum(1 for domain in DOMAINS for name in CLASSES for _ in (root / domain / name).glob("*.png"))
    return images == len(DOMAINS) * len(CLASSES) * IMAGES_PER_CLASS


def _write(root: Path) -> None:
    from sklearn.datasets import load_digits  # lazily: takes a second, and every worker imports this module

    digits = load_digits()
    allocation = split_base_digits(digits.target)
    for number, (domain, render) in enumerate(DOMAINS.items()):
        rng = np.random.default_rng([SEED, number])
        for name, indices in zip(CLASSES, allocation[domain], strict=True):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for position, stroke in enumerate(strokes(digits.images[indices])):
                pixels = np.clip(render(stroke, rng), 0, 1)
                file = folder / f"{position:04}.png"
                Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(file)
                os.utime(file, (MODIFIED_S, MODIFIED_S))


def _blend(background: np.ndarray, color: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Blend a color (3,) over a background (32, 32, 3 or 1) with opacity `coverage` (32, 32)."""
    blended: np.ndarray = background + coverage[..., None] * (color - background)
    return blended


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.demo.digits FOLDER")
    write_digits(Path(sys.argv[1]))
