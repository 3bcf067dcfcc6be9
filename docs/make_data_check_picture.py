"""Take the screenshot of the data check's page in docs/datasets.md, of a drawn data set with planted issues:
`python docs/make_data_check_picture.py`. Needs Chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

from pipeline.config import DataConfig
from pipeline.data.checked_images import check_images, read_checked_images, read_samples, sample_paths
from pipeline.data.findings import find_issues
from pipeline.data.index import index_dataset
from pipeline.data.splits import sample_splits
from pipeline.report.data_check import check_page, task_overviews
from pipeline.stages.data_check import find_thumbnails

PICTURE = Path(__file__).with_name("pictures") / "data_check.png"
WIDTH, HEIGHT = 1100, 1190
SIDE = 160


def draw(name: str, task: str, rng: np.random.Generator) -> Image.Image:
    """Draw a mug, lamp, boat or tree, at a random place and in random colors."""
    is_photo = task == "photo"
    colors = [tuple(int(value) for value in rng.integers(60, 230, 3)) for _ in range(3)]
    low, high = rng.uniform(60, 130), rng.uniform(150, 240)
    ramp = np.linspace(high, low, SIDE)[:, None, None] * np.array([1.0, 0.97, 0.9]) * rng.uniform(0.8, 1.0, 3)
    background = np.broadcast_to(ramp, (SIDE, SIDE, 3)) if is_photo else np.full((SIDE, SIDE, 3), 250.0)
    image = Image.fromarray((background + rng.normal(0, 6 * is_photo, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    fill = {"outline": "#222", "width": 3} if not is_photo else {"fill": colors[0]}
    other_fill = {"outline": "#222", "width": 3} if not is_photo else {"fill": colors[1]}
    x, y, size = rng.uniform(50, 90), rng.uniform(60, 95), rng.uniform(26, 44)
    match name:
        case "mug":
            pen.ellipse([x + size * 0.5, y - size * 0.5, x + size * 1.5, y + size * 0.5], outline=colors[0], width=8)
            pen.rectangle([x - size, y - size, x + size, y + size], **fill)
        case "lamp":
            pen.rectangle([x - 4, y, x + 4, y + size * 1.4], **other_fill)
            pen.ellipse([x - size, y + size * 1.2, x + size, y + size * 1.6], **other_fill)
            pen.polygon([(x - size, y), (x - size * 0.4, y - size), (x + size * 0.4, y - size), (x + size, y)], **fill)
        case "boat":
            points = [(x - size * 1.3, y + size * 0.5), (x + size * 1.3, y + size * 0.5), (x + size, y + size)]
            pen.polygon([*points, (x - size, y + size)], **fill)
            pen.polygon([(x, y - size * 1.3), (x, y + size * 0.3), (x + size, y + size * 0.3)], **other_fill)
        case "tree":
            pen.rectangle([x - 6, y, x + 6, y + size * 1.3], **other_fill)
            pen.ellipse([x - size, y - size * 1.3, x + size, y + size * 0.5], **fill)
    return image.filter(ImageFilter.GaussianBlur(0.8)) if is_photo else image


def write_data(root: Path) -> None:
    rng = np.random.default_rng(7)
    drawn: dict[str, Image.Image] = {}
    for task in ("photo", "sketch"):
        for name in ("boat", "lamp", "mug", "tree"):
            (root / task / name).mkdir(parents=True)
            for number in range(8):
                drawn[f"{task}/{name}/{number:04}.jpg"] = draw(name, task, rng)
    drawn["photo/lamp/IMG_2041.jpg"] = drawn["photo/mug/0003.jpg"]
    drawn["photo/boat/IMG_2042 (1).jpg"] = drawn["photo/boat/0001.jpg"].resize((120, 120))
    drawn["photo/tree/lens cap on.jpg"] = Image.new("RGB", (SIDE, SIDE), (3, 3, 4))
    drawn["sketch/mug/icon.jpg"] = drawn["sketch/mug/0002.jpg"].resize((24, 24))
    drawn["photo/boat/panorama.jpg"] = draw("boat", "photo", rng).resize((900, 150))
    for path, image in drawn.items():
        image.save(root / path, quality=92)
    gray = np.asarray(drawn["photo/mug/0005.jpg"].convert("L")).astype(np.uint32) * 4095 // 255
    Image.fromarray(gray.astype(np.uint16)).save(root / "photo/mug/microscope.png")
    (root / "photo/mug/download.jpg").write_bytes(b"<!doctype html><title>404 Not Found</title>")
    for number in range(3):
        (root / f"photo/tree/IMG_3{number}.heic").write_bytes(b"heic")


def main() -> None:
    with TemporaryDirectory() as folder:
        root, page = Path(folder, "data"), Path(folder, "check.html")
        write_data(root)
        index = index_dataset(DataConfig(), root)
        pq.write_table(check_images(root, index.images, sample_paths(index.images)), Path(folder, "images.parquet"))
        images = read_checked_images(Path(folder, "images.parquet"), index.images)
        decodable = [checked.image for checked in images if checked.stats]
        training = [image.path for image in sample_splits(decodable, index.classes, 4, 1).train]
        findings = find_issues(images, index.classes, index.class_names, {}, 4, training, skipped=index.skipped)
        html = check_page(
            "shops",
            task_overviews(images, index.classes),
            findings,
            read_samples(Path(folder, "images.parquet")),
            index.class_names,
            find_thumbnails(root, findings),
        )
        page.write_text(html, encoding="utf-8")
        if len(sys.argv) > 1:
            shutil.copy(page, sys.argv[1])
        browser = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("no Chromium on this machine")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
        subprocess.run([browser, *options, f"--screenshot={PICTURE}", str(page)], check=True, capture_output=True)


if __name__ == "__main__":
    main()
