"""The embedded demo: the files of write_digits, and zero-shot accuracy of the tiny CLIP on them."""

import hashlib
import json
import shutil
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.config import CONFIGS, load_yaml, parse_config
from pipeline.demo.digits import (
    ANGLES,
    CLASSES,
    CLIP_IMAGES_PER_CLASS,
    DOMAINS,
    IMAGES_PER_CLASS,
    PENS,
    draw,
    read_base_digits,
    split_base_digits,
    strokes,
    write_digits,
)
from pipeline.errors import UserError
from pipeline.stages.plan import make_plan

DEMO = Path(__file__).parent.parent / "pipeline" / "demo"
WEIGHTS = DEMO / "digits_clip.safetensors"


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return read_base_digits()[1]


def test_the_base_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images, labels = read_base_digits()
    expected = load_digits()
    assert np.array_equal(images, expected.images) and np.array_equal(labels, expected.target)


def _fingerprint(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("is_there", [False, True])
def test_digits_that_cannot_be_written_are_named_with_the_remedy(tmp_path, monkeypatch, is_there):
    def fail(root: Path) -> None:
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr("pipeline.stages.plan.write_digits", fail)
    if is_there:
        (tmp_path / "datasets" / "digits").mkdir(parents=True)
    config = parse_config(load_yaml(CONFIGS / "demo.yaml") | {"storage": str(tmp_path)})
    with pytest.raises(UserError, match="remove this folder" if is_there else "let this user write"):
        make_plan(config, Console(quiet=True))


def test_writing_twice_gives_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "deep" / "digits"
    write_digits(copy)
    assert _fingerprint(copy) == _fingerprint(digits)


def test_layout_counts_and_image_format(digits: Path) -> None:
    assert sorted(path.name for path in digits.iterdir()) == sorted(DOMAINS)
    for domain in DOMAINS:
        assert sorted(path.name for path in (digits / domain).iterdir()) == ["test", "train"]
        for split, number in IMAGES_PER_CLASS.items():
            assert sorted(path.name for path in (digits / domain / split).iterdir()) == sorted(CLASSES)
            for name in CLASSES:
                files = sorted(path.name for path in (digits / domain / split / name).iterdir())
                assert files == [f"{position:04}.png" for position in range(number)]
    with Image.open(digits / "ink_left" / "test" / "seven" / "0000.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))


def test_a_complete_set_is_left_and_a_foreign_folder_is_refused(digits: Path, tmp_path: Path) -> None:
    modified_ns = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    write_digits(digits)
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == modified_ns

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(OSError):
        write_digits(tmp_path / "own")
    assert [path.name for path in tmp_path.rglob("*")] == ["own", "thesis.txt"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stroke: np.ndarray) -> np.ndarray:
        raise RuntimeError("out of ink")

    monkeypatch.setitem(PENS, "thick", broken)
    with pytest.raises(RuntimeError, match="out of ink"):
        write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_base_digits_are_of_their_class_and_only_test_digits_are_shared(labels: np.ndarray) -> None:
    """By one domain that is turned left and one that is turned right, drawn with different pens."""
    allocation = split_base_digits(labels)
    assert set(allocation) == {("clip", "train"), *product(DOMAINS, ("train", "test"))}
    for (name, split), indices in allocation.items():
        per_class = CLIP_IMAGES_PER_CLASS if name == "clip" else IMAGES_PER_CLASS[split]
        assert indices.shape == (len(CLASSES), per_class)
        assert (labels[indices] == np.arange(len(CLASSES))[:, None]).all()

    drawn_by = defaultdict(list)
    for part, indices in allocation.items():
        for index in np.unique(indices):
            drawn_by[index].append(part)
        assert len(np.unique(indices)) == indices.size
    shared = {tuple(sorted(parts)) for parts in drawn_by.values() if len(parts) > 1}
    pens = defaultdict(list)
    for pair in shared:
        (left, left_split), (right, right_split) = pair = sorted(pair, key=lambda part: part[0].split("_")[1])
        assert left_split == right_split == "test" and np.array_equal(allocation[pair[0]], allocation[pair[1]])
        for side, domain in (("left", left), ("right", right)):
            pen, turned = domain.split("_")
            assert turned == side
            pens[side].append(pen)
        assert left.split("_")[0] != right.split("_")[0]
    assert sorted(pens["left"]) == sorted(pens["right"]) == sorted(PENS)  # each domain's test digits are shared once


def test_the_clip_was_trained_on_other_digits(labels: np.ndarray) -> None:
    """Its digits are the first of each class's permutation, whatever domains there are; its weights are not trained
    again."""
    rng = np.random.default_rng(20240)
    expected = [rng.permutation(np.flatnonzero(labels == digit))[:42] for digit in range(len(CLASSES))]
    np.testing.assert_array_equal(split_base_digits(labels)["clip", "train"], expected)


def test_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size <= 9e6


def test_zero_shot_is_good_on_upright_digits_and_leaves_room_on_turned_ones(
    digits: Path, labels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_torchvision()
    import open_clip

    config = {"model_cfg": json.loads((DEMO / "digits_clip.json").read_text()), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copyfile(WEIGHTS, tmp_path / "open_clip_model.safetensors")
    name = f"local-dir:{tmp_path}"  # open_clip's names stay as they are
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokens = open_clip.get_tokenizer(name)([f"a photo of the digit {name}." for name in CLASSES])
    truth = torch.arange(len(CLASSES)).repeat_interleave(IMAGES_PER_CLASS["test"])

    def accuracy_of(images: list[Image.Image]) -> float:
        with torch.no_grad():
            text = model.encode_text(tokens, normalize=True)
            predicted = (model.encode_image(torch.stack([*map(preprocess, images)]), normalize=True) @ text.T).argmax(1)
        return (predicted == truth).float().mean().item()

    accuracy = {}
    for domain in DOMAINS:
        files = [path for name in CLASSES for path in sorted((digits / domain / "test" / name).iterdir())]
        accuracy[domain] = accuracy_of([Image.open(path) for path in files])
    average = sum(accuracy.values()) / len(accuracy)
    assert 0.5 < average < 0.65 and min(accuracy.values()) > 0.45 and max(accuracy.values()) < 0.7, accuracy

    monkeypatch.setitem(ANGLES, "left", 0)
    rng, indices = np.random.default_rng(1), split_base_digits(labels)["ink_left", "test"].ravel()
    drawn = [draw(stroke, "ink_left", rng) for stroke in strokes(read_base_digits()[0][indices])]
    upright = accuracy_of([Image.fromarray(np.rint(pixels * 255).astype(np.uint8)) for pixels in drawn])
    assert upright > 0.9
