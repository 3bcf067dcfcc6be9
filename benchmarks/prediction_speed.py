#!/usr/bin/env python
"""Time to predict a batch, compared with open_clip's image encoder on the same preprocessed images, weights and
threads; also with JPEG decoding.

    python benchmarks/prediction_speed.py                        ViT-B/32, 64 images, 65 classes, float32
    python benchmarks/prediction_speed.py --device cuda --model ViT-B-16
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import autocast, class_names, default_device, device_name, median_seconds, table, write_results
from PIL import Image

from pipeline.clip.load import load_clip, weights_fingerprint
from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.config import ClipConfig, Config, MmapConfig
from pipeline.methods.adapter_file import TrainedAdapter, save_adapter
from pipeline.methods.mmap import GroupMmap, MmapShape
from pipeline.prediction.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model name")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--classes", type=int, default=65)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--side", type=int, default=500, help="width of the JPEGs in pixels")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default=default_device())
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    ensure_torchvision()
    import open_clip

    original = open_clip.create_model(arguments.model).eval().to(device)
    config = Config(clip=ClipConfig(model=arguments.model, pretrained=None, precision=arguments.precision))
    words = class_names(arguments.classes)
    group = {f"task {number}": words for number in range(arguments.tasks)}
    model = load_model(make_adapter_file(config, group), arguments.device)

    encoded = jpegs(arguments.images, arguments.side)
    size = model.preprocessing.image_size
    pixels = torch.randint(0, 256, (arguments.images, 3, size, size), dtype=torch.uint8)
    standardized = model.classifier.towers.normalize_pixels(pixels.to(device)).float()

    @torch.no_grad()
    def open_clip_alone() -> torch.Tensor:
        with autocast(device, arguments.precision):
            return original.encode_image(standardized)

    steps = {
        "open_clip encode_image": open_clip_alone,
        "predict, one task": lambda: model.predict_pixels(pixels, "task 0"),
        "predict, all tasks": lambda: model.predict_pixels(pixels),
        "predict with decoding, one task": lambda: model.predict(encoded, "task 0"),
    }
    for step in steps.values():
        step()
    seconds = median_seconds(steps, arguments.repeats, device)
    baseline = seconds["open_clip encode_image"]

    print(f"{arguments.model}, {arguments.images} images, {arguments.classes} classes, {arguments.tasks} tasks")
    print(f"{arguments.precision}, {device_name(device)}, torch {torch.__version__}\n")
    rows = [[name, f"{s:.3f}", f"{s / baseline:.2f}x"] for name, s in seconds.items()]
    print(table(["", "s", "relative to open_clip"], rows))
    values = {name: getattr(arguments, name) for name in ("model", "images", "classes", "tasks", "side", "precision")}
    write_results(f"prediction_speed_{arguments.model}", device, {**values, "seconds": seconds})


def make_adapter_file(config: Config, group: dict[str, list[str]]) -> Path:
    """Write an adapter of MmAP with initial group and task prompts; their values do not affect the time."""
    towers = load_clip(config.clip)
    module = GroupMmap(MmapShape.of(MmapConfig(), towers), tuple(group), seed=1)
    file = Path(tempfile.mkdtemp()) / "adapter.safetensors"
    save_adapter(file, TrainedAdapter("mmap", config, weights_fingerprint(towers), (group,), (module.state_dict(),)))
    load_clip.cache_clear()
    return file


def jpegs(count: int, side: int) -> list[bytes]:
    """Return JPEGs of smooth noise, which compresses about as well as photographs."""
    random, encoded = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        encoded.append(stream.getvalue())
    return encoded


if __name__ == "__main__":
    main()
