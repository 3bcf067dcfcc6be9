#!/usr/bin/env python
"""Size of an exported task, and its time for a batch of preprocessed images compared with that of `pipeline.load`.

python benchmarks/exported_speed.py                     ViT-B/32, batches of 1 and 64, 65 classes, float32
python benchmarks/exported_speed.py --model ViT-B-16 --images 1 16
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import class_names, device_name, median_seconds, table, write_results
from prediction_speed import make_adapter_file

from pipeline.config import ClipConfig, Config
from pipeline.methods.adapter_file import load_adapter
from pipeline.prediction.export import INPUT, export_task
from pipeline.prediction.load import load_model
from pipeline.prediction.options import ModelOptions

TASK = "task 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model name")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 64], help="batch sizes")
    parser.add_argument("--classes", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()

    import onnxruntime

    config = Config(clip=ClipConfig(model=arguments.model, pretrained=None, precision="float32"))
    adapter_file = make_adapter_file(config, {TASK: class_names(arguments.classes)})
    model, device = load_model(adapter_file, "cpu"), torch.device("cpu")
    size = model.preprocessing.image_size
    with tempfile.TemporaryDirectory() as temporary:
        files = {kind: Path(temporary) / f"task.{kind}" for kind in ("onnx", "pt2")}
        megabytes = {}
        for kind, file in files.items():
            difference = export_task(load_adapter(adapter_file), ModelOptions(), TASK, file)
            megabytes[kind] = file.stat().st_size / 1e6
            print(f"{kind}: {megabytes[kind]:,.1f} MB, probabilities differ by at most {difference:.1g}", flush=True)
        session = onnxruntime.InferenceSession(files["onnx"], providers=["CPUExecutionProvider"])
        program = torch.export.load(files["pt2"]).module()

        @torch.inference_mode()
        def run_program(pixels: torch.Tensor) -> None:
            program(pixels)

        def run_session(pixels: torch.Tensor) -> None:
            session.run(None, {INPUT: pixels.numpy()})

        seconds = {}
        for count in arguments.images:
            pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
            steps = {
                "pipeline.load": partial(model.classifier.probabilities, TASK, pixels),
                "ONNX Runtime": partial(run_session, pixels),
                "torch.export": partial(run_program, pixels),
            }
            for step in steps.values():
                step()
            seconds[count] = median_seconds(steps, arguments.repeats, device)

    print(f"\n{arguments.model}, {arguments.classes} classes, MmAP, float32, {device_name(device)}\n")
    rows = [
        [str(count), name, f"{value:.4f}", f"{value / by_name['pipeline.load']:.2f}x"]
        for count, by_name in seconds.items()
        for name, value in by_name.items()
    ]
    print(table(["images", "", "s", "relative to pipeline.load"], rows))
    values = {"model": arguments.model, "classes": arguments.classes, "megabytes": megabytes, "seconds": seconds}
    write_results(f"exported_speed_{arguments.model}", device, {**values, "onnxruntime": onnxruntime.__version__})


if __name__ == "__main__":
    main()
