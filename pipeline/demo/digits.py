"""The demo's data set: handwritten digits in six visual domains, drawn with three pens and turned to the left or right.

    python -m pipeline.demo.digits FOLDER      writes FOLDER/<domain>/<train or test>/<class>/*.png

The 8x8 digits of scikit-learn are partitioned, class by class, into the tiny CLIP's training set, a few training images
of each domain, and test digits. A test digit is drawn twice, once turned left and once right, with different pens: more
test images make differences between methods visible. So domains that are turned the same way are similar tasks, which
task grouping can find.
"""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.files import atomic_replace

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 32
CLIP_IMAGES_PER_CLASS = 42
IMAGES_PER_CLASS = {"train": 4, "test": 36}
"""Split → images of each class and domain."""
SEED = 20240
MODIFIED_S = 946_684_800
"""Modification time of the files, the same on all machines: the data set's fingerprint includes it."""


def ink(stroke: np.ndarray) -> np.ndarray:
    """The stroke as it is."""
    return stroke


def thick(stroke: np.ndarray) -> np.ndarray:
    """A stroke two pixels wider."""
    from scipy import ndimage  # lazily: every worker imports this module, and few draw digits

    widened: np.ndarray = ndimage.grey_dilation(stroke, (3, 3))
    return widened


def blur(stroke: np.ndarray) -> np.ndarray:
    """A stroke out of focus."""
    from scipy import ndimage

    blurred: np.ndarray = ndimage.gaussian_filter(stroke, 1.5)
    return np.clip(1.3 * blurred, 0, 1)


PENS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"ink": ink, "thick": thick, "blur": blur}
ANGLES = {"left": 45, "right": -45}
"""Degrees that digits are turned by; five more or less for each of them."""
DOMAINS = tuple(f"{pen}_{side}" for pen in PENS for side in ANGLES)


def draw(stroke: np.ndarray, domain: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a stroke (32, 32) on cream paper with a faint grain → pixels (32, 32, 3) in 0..1."""
    from scipy import ndimage

    pen, side = domain.split("_")
    angle = ANGLES[side] + rng.uniform(-5, 5)
    turned: np.ndarray = ndimage.rotate(PENS[pen](stroke), angle, reshape=False, order=1)
    paper = np.array([0.96, 0.93, 0.84]) + rng.normal(0, 0.02, (SIZE, SIZE, 1))
    blue_black = np.array([0.08, 0.10, 0.28])
    return np.clip(paper + turned[..., None] * (blue_black - paper), 0, 1)


def read_base_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits (n, 8, 8) in 0..16 and their labels (n,), those of `sklearn.datasets.load_digits`,
    from its file: importing scikit-learn takes more than a second."""
    spec = find_spec("sklearn")
    assert spec and spec.origin
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)


def split_base_digits(labels: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """Split the base digits: (domain, "train" or "test"), or ("clip", "train") → indices (classes, images).

    All are disjoint, but for the test digits of a domain that is turned left and one that is turned right.
    """
    rng = np.random.default_rng(SEED)
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(len(CLASSES))]
    parts: dict[tuple[str, str], int] = {("clip", "train"): CLIP_IMAGES_PER_CLASS}
    parts |= {(domain, "train"): IMAGES_PER_CLASS["train"] for domain in DOMAINS}
    parts |= {(f"{pen}_left", "test"): IMAGES_PER_CLASS["test"] for pen in PENS}
    ends = np.cumsum(list(parts.values()))
    indices = {
        part: np.stack([digits[end - size : end] for digits in shuffled])
        for (part, size), end in zip(parts.items(), ends, strict=True)
    }
    pens = list(PENS)
    for pen, next_pen in zip(pens, pens[1:] + pens[:1], strict=True):
        indices[f"{next_pen}_right", "test"] = indices[f"{pen}_left", "test"]
    return indices


def strokes(images: np.ndarray) -> np.ndarray:
    """Convert base digits (n, 8, 8) in 0..16 to stroke coverage (n, 32, 32) in 0..1."""
    scaled = [
        Image.fromarray((image * (255 / 16)).astype(np.uint8)).resize((24, 24), Image.Resampling.BICUBIC)
        for image in images
    ]
    coverage = np.stack([np.asarray(image, dtype=np.float64) for image in scaled]) / 255
    return np.pad(np.clip(1.6 * coverage - 0.3, 0, 1), ((0, 0), (4, 4), (4, 4)))


def write_digits(root: Path) -> None:
    """Write the data set as <root>/<domain>/<split>/<class>/<nnnn>.png, 32x32 RGB; a complete set is kept.

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
    return all(
        sum(1 for _ in (root / domain / split / name).glob("*.png")) == number
        for domain in DOMAINS
        for split, number in IMAGES_PER_CLASS.items()
        for name in CLASSES
    )


def _write(root: Path) -> None:
    images, labels = read_base_digits()
    allocation = split_base_digits(labels)
    for number, domain in enumerate(DOMAINS):
        rng = np.random.default_rng([SEED, number])
        for split in IMAGES_PER_CLASS:
            for name, indices in zip(CLASSES, allocation[domain, split], strict=True):
                folder = root / domain / split / name
                folder.mkdir(parents=True)
                for position, stroke in enumerate(strokes(images[indices])):
                    file = folder / f"{position:04}.png"
                    pixels = np.rint(draw(stroke, domain, rng) * 255).astype(np.uint8)
                    Image.fromarray(pixels).save(file)
                    os.utime(file, (MODIFIED_S, MODIFIED_S))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.demo.digits FOLDER")
    write_digits(Path(sys.argv[1]))
