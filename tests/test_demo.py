"""The embedded demo: the files of write_digits, and zero-shot accuracy of the tiny CLIP on them."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.config import CONFIGS, load_yaml, parse_config
from pipeline.demo.digits import (
    CLASSES,
    CLIP_IMAGES_PER_CLASS,
    DOMAINS,
    IMAGES_PER_CLASS,
    split_base_digits,
    write_digits,
)
from pipeline.errors import UserError
from pipeline.stages.plan import make_plan

DEMO = Path(__file__).parent.parent / "pipeline" / "demo"
WEIGHTS = DEMO / "digits_clip.safetensors"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "digits"
    write_digits(root)
    return root


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
        assert sorted(path.name for path in (digits / domain).iterdir()) == sorted(CLASSES)
        for name in CLASSES:
            files = sorted(path.name for path in (digits / domain / name).iterdir())
            assert files == [f"{number:04}.png" for number in range(IMAGES_PER_CLASS)]
    with Image.open(digits / "neon" / "seven" / "0000.png") as image:
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
    def broken(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        raise RuntimeError("out of ink")

    monkeypatch.setitem(DOMAINS, "outline", broken)
    with pytest.raises(RuntimeError, match="out of ink"):
        write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_base_digits_are_disjoint_and_of_their_class() -> None:
    from sklearn.datasets import load_digits  # as in the demo

    labels = load_digits().target
    allocation = split_base_digits(labels)
    assert list(allocation) == ["clip", *DOMAINS]
    for name, indices in allocation.items():
        per_class = CLIP_IMAGES_PER_CLASS if name == "clip" else IMAGES_PER_CLASS
        assert indices.shape == (len(CLASSES), per_class)
        assert (labels[indices] == np.arange(len(CLASSES))[:, None]).all()
    dealt = np.concatenate([indices.ravel() for indices in allocation.values()])
    assert len(np.unique(dealt)) == len(dealt)


def test_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size <= 9e6


def test_zero_shot_is_good_at_home_and_leaves_room_elsewhere(digits: Path, tmp_path: Path) -> None:
    ensure_torchvision()
    import open_clip

    config = {"model_cfg": json.loads((DEMO / "digits_clip.json").read_text()), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copyfile(WEIGHTS, tmp_path / "open_clip_model.safetensors")
    name = f"local-dir:{tmp_path}"  # open_clip's names stay as they are
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokens = open_clip.get_tokenizer(name)([f"a photo of the digit {name}." for name in CLASSES])
    accuracy = {}
    with torch.no_grad():
        text = model.encode_text(tokens, normalize=True)
        for domain in DOMAINS:
            files = [path for name in CLASSES for path in sorted((digits / domain / name).iterdir())]
            images = torch.stack([preprocess(Image.open(path)) for path in files])
            predicted = (model.encode_image(images, normalize=True) @ text.T).argmax(1)
            truth = torch.arange(len(CLASSES)).repeat_interleave(IMAGES_PER_CLASS)
            accuracy[domain] = (predicted == truth).float().mean().item()
    average = sum(accuracy.values()) / len(accuracy)
    assert accuracy["ink"] > 0.9, accuracy
    assert min(accuracy.values()) > 0.2, accuracy
    assert 0.4 < average < 0.85, accuracy
