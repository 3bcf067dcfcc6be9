"""Preprocessing of a CLIP: from options, tags and defaults, another image size, and what an adapter records.

The pixels of each resize mode are compared with open_clip's in test_data.py.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pipelines import REPOSITORY
from rich.console import Console
from safetensors.torch import save_file
from small_clip import open_clip

import pipeline
from pipeline.clip.load import assumed_preprocessing, build_meta_towers, clip_identity, load_clip
from pipeline.clip.preprocessing import preprocessing_notes, resolve_preprocessing
from pipeline.config import BUILTIN_DIGITS, ClipConfig, Config, parse_config
from pipeline.data.images import evaluation_pixels
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, save_adapter
from pipeline.methods.registry import METHODS
from pipeline.prediction.decoding import decode_rows
from pipeline.stages.plan import make_plan

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "open_clip": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "timm": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"},
}
RECORDED = {"size": 99, "resize_mode": "squash", "interpolation": "bicubic", "mean": [0.7, 0.7, 0.7], "std": 0.25}
OPTIONS = {
    "image_size": 40,
    "resize_mode": "longest",
    "interpolation": "bilinear",
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "fill_color": 77,
    "jpeg_draft": True,
}


@pytest.fixture
def weights_copy(tmp_path):
    """The built-in weights, as a user's file."""
    file = tmp_path / "weights.safetensors"
    shutil.copyfile(REPOSITORY / "pipeline" / "demo" / "digits_clip.safetensors", file)
    return str(file)


@pytest.fixture(scope="module", params=VISION)
def folder(request, tmp_path_factory):
    """A snapshot folder of open_clip with random weights and a record of its preprocessing."""
    folder = tmp_path_factory.mktemp(request.param)
    values = {"embed_dim": 12, "vision_cfg": VISION[request.param], "text_cfg": TEXT}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**values).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values, "preprocess_cfg": RECORDED}))
    return str(folder)


def resolved(config: ClipConfig) -> Preprocessing:
    values = json.loads(clip_identity(config).preprocessing)
    return Preprocessing(**values | {name: tuple(values[name]) for name in ("mean", "std")})


def test_the_preprocessing_of_every_tag_is_open_clips():
    for name, tag in open_clip.list_pretrained():
        model_config, recorded = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
        expected = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), recorded)
        expected["size"] = model_config["vision_cfg"]["image_size"]
        values = asdict(resolve_preprocessing(ClipConfig(model=name, pretrained=tag), model_config, recorded))
        assert not values.pop("jpeg_draft")
        values["size"], values["mode"] = values.pop("image_size"), "RGB"
        assert values == expected, (name, tag)


def test_the_preprocessing_of_a_folder_is_the_recorded_one_for_model_or_weights(folder):
    recorded = Preprocessing(resolved(ClipConfig(model=folder)).image_size, "squash", mean=(0.7,) * 3, std=(0.25,) * 3)
    assert recorded.image_size == open_clip.create_model(f"local-dir:{folder}").visual.image_size[0]
    model_config = json.loads((Path(folder) / "open_clip_config.json").read_text())["model_cfg"]
    (file := Path(folder) / "model.json").write_text(json.dumps(model_config))
    weights = f"{folder}/open_clip_model.safetensors"
    for model, pretrained, expected in [
        (folder, folder, recorded),
        (folder, weights, recorded),
        (str(file), folder, recorded),
        (str(file), weights, Preprocessing(recorded.image_size)),
    ]:
        config = ClipConfig(model=model, pretrained=pretrained)
        assert resolved(config) == build_meta_towers(config).preprocessing == expected
        assert len(assumed_preprocessing(config)) == (pretrained == weights)


def test_tags_of_known_exceptions():
    openai = Preprocessing(224)
    assert resolved(ClipConfig()) == resolved(ClipConfig(pretrained=None)) == openai
    assert resolved(ClipConfig(model="ViT-H-14", pretrained="dfn5b")) == replace(openai, resize_mode="squash")
    half = replace(openai, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert resolved(ClipConfig(model="ViT-L-14", pretrained="laion2b_s32b_b82k")) == half


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_overrides_what_is_recorded(name):
    model_config = {"vision_cfg": {"image_size": 24}}
    plain = resolve_preprocessing(ClipConfig(), model_config, RECORDED)
    assert plain == Preprocessing(24, "squash", mean=(0.7,) * 3, std=(0.25,) * 3)
    options = ClipConfig(**{name: OPTIONS[name]})
    assert resolve_preprocessing(options, model_config, RECORDED) == replace(plain, **{name: OPTIONS[name]})


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("interpolation", "nearest", "bilinear"),
        ("resize_mode", "stretch", "squash"),
        ("std", [0.5, 0, 0.5], (0.5,) * 3),
        ("mean", [0.5, 0.5], (0.5,) * 3),
        ("fill_color", [1, 2, 3], 9),
    ],
)
def test_what_is_recorded_and_cannot_be_done_is_told_with_the_option_that_helps(name, value, option):
    model_config = {"vision_cfg": {}}
    with pytest.raises(UserError, match=rf"clip.pretrained=openai: .* has {name}=.*: set clip.{name}$"):
        resolve_preprocessing(ClipConfig(), model_config, {name: value})
    preprocessing = resolve_preprocessing(ClipConfig(**{name: option}), model_config, {name: value})
    assert preprocessing == replace(Preprocessing(224), **{name: option})


def test_random_interpolation_is_bicubic_as_in_open_clip():
    assert resolve_preprocessing(ClipConfig(), {"vision_cfg": {}}, {"interpolation": "random"}) == Preprocessing(224)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(UserError, match=r"clip.model=ViT-B-16-quickgelu: its images are not square, but \[224, 112\]"):
        resolve_preprocessing(ClipConfig(), {"vision_cfg": {"image_size": [224, 112]}}, {})
    assert resolve_preprocessing(ClipConfig(), {"vision_cfg": {"image_size": [64, 64]}}, {}).image_size == 64


# Weights without a record


def test_what_is_assumed_for_a_file_is_told_until_options_say_it():
    file, taken = {"pretrained": "clip.pt"}, Preprocessing(224)
    (note,) = preprocessing_notes(ClipConfig(**file), taken, {}, {})
    assert note.startswith(
        "clip.pretrained=clip.pt has no record of its preprocessing: taking OpenAI's: clip.resize_mode shortest, "
        "clip.interpolation bicubic, clip.mean 0.4815 0.4578 0.4082, clip.std 0.2686 0.2613 0.2758. If"
    )
    half, squash = ClipConfig(**file, mean=(0.5,) * 3, std=(0.5,) * 3), {"resize_mode": "squash"}
    (note,) = preprocessing_notes(half, taken, squash, {})
    assert "taking OpenAI's: clip.interpolation bicubic. If" in note
    (note,) = preprocessing_notes(half, replace(taken, **squash), {}, squash)
    assert "taking that of clip.model, else OpenAI's: clip.resize_mode squash, clip.interpolation bicubic. If" in note
    options = {name: value for name, value in OPTIONS.items() if name not in ("image_size", "fill_color")}
    assert preprocessing_notes(ClipConfig(**file, **options), taken, {}, {}) == []
    assert preprocessing_notes(ClipConfig(**file), taken, options, {}) == []
    for known in (None, BUILTIN_DIGITS):
        assert preprocessing_notes(ClipConfig(pretrained=known), taken, {}, {}) == []


def test_a_run_tells_what_it_assumes_at_its_start(weights_copy, tmp_path):
    clip = {"model": BUILTIN_DIGITS, "pretrained": weights_copy}
    config = parse_config({"storage": str(tmp_path / "runs"), "data": {"root": BUILTIN_DIGITS}, "clip": clip})
    console = Console(file=io.StringIO(), width=1000)
    make_plan(config, console)
    assert console.file.getvalue().count("has no record of its preprocessing") == 1


# Another image size


@pytest.mark.parametrize("ratio", [1.5, 0.5])
def test_another_image_size_resizes_the_position_embedding_as_open_clip_does(folder, ratio):
    config = ClipConfig(model=folder)
    size = round(resolved(config).image_size * ratio)
    reference = open_clip.create_model(f"local-dir:{folder}", force_image_size=size).eval()
    config = config.model_copy(update={"image_size": size})
    towers, images = load_clip(config), torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(towers.encode_image(images), reference.encode_image(images), rtol=1e-5, atol=1e-6)
    assert towers.preprocessing == build_meta_towers(config).preprocessing == resolved(config)
    assert towers.preprocessing.image_size == size
    assert towers.image_tower.num_tokens == build_meta_towers(config).image_tower.num_tokens


def test_an_image_size_that_a_model_cannot_take_is_refused(folder):
    remedy = "16, such as 224" if "timm" in folder else "8, such as 232"
    with pytest.raises(UserError, match=rf"clip.image_size=230 .* \(not a multiple of its patch size {remedy}\)"):
        build_meta_towers(ClipConfig(model=folder, image_size=230))


def test_a_model_of_one_image_size_is_told():
    with pytest.raises(UserError, match="image_size=288 is not possible for clip.model=RN50 .a ModifiedResNet has one"):
        build_meta_towers(ClipConfig(model="RN50", pretrained=None, image_size=288))
    build_meta_towers(ClipConfig(model="RN50", pretrained=None, image_size=224))


# From images to the input of the model


def test_the_input_of_the_model_is_open_clips(photos):
    options = {name: value for name, value in OPTIONS.items() if name != "image_size"}
    for preprocessing in (Preprocessing(32), Preprocessing(40, **options)):
        values = asdict(preprocessing)
        del values["jpeg_draft"]  # these images are decoded
        reference = open_clip.transform.PreprocessCfg(size=values.pop("image_size"), **values)
        transform = open_clip.transform.image_transform_v2(reference, is_train=False)
        config = ClipConfig(model=BUILTIN_DIGITS, pretrained=None, **asdict(preprocessing))
        towers = load_clip(config)
        pixels = torch.stack([torch.from_numpy(evaluation_pixels(image, preprocessing)) for image in photos])
        expected = torch.stack([transform(image) for image in photos])
        torch.testing.assert_close(towers.normalize_pixels(pixels), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    sizes = [(50, 70), (90, 20), (33, 32)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def large_jpeg() -> bytes:
    """Encode an image that is decoded smaller with `jpeg_draft`."""
    buffer = io.BytesIO()
    Image.effect_noise((400, 400), 90).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


# Adapters


@pytest.fixture
def adapter(tmp_path):
    """An adapter trained with options, and its file."""
    config = Config(clip=ClipConfig(model=BUILTIN_DIGITS, pretrained=BUILTIN_DIGITS, **OPTIONS))
    towers, group = load_clip(config.clip), {"ink": ["one", "two"]}
    state = METHODS["coop"].build(config, towers, group).state_dict()
    plain = Config(clip=ClipConfig(model=BUILTIN_DIGITS, pretrained=BUILTIN_DIGITS))
    file = tmp_path / "adapter.safetensors"
    save_adapter(file, TrainedAdapter.on_towers(towers, "coop", plain, (group,), (state,)))
    return file


def test_an_adapter_records_the_preprocessing_and_all_ways_to_predict_use_it(adapter, photos, weights_copy):
    """The config of the adapter's run, and the weights of another place, would give OpenAI's."""
    preprocessing = Preprocessing(**OPTIONS)
    images = [*photos, large_jpeg()]
    loaded = load_adapter(adapter)
    pixels = torch.stack([torch.from_numpy(evaluation_pixels(image, preprocessing)) for image in images])
    towers = loaded.towers(pretrained=weights_copy)
    assert (
        towers.preprocessing
        == build_meta_towers(loaded.config.clip.with_weights(weights_copy)).preprocessing
        == preprocessing
    )
    expected = loaded.classifier(towers=towers).probabilities("ink", pixels)
    model = pipeline.load(adapter, pretrained=weights_copy)
    predicted = torch.tensor([list(prediction.probabilities.values()) for prediction in model.predict(images)])
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-6)
    assert model.preprocessing == preprocessing

    elsewhere = loaded.config.clip.with_weights("/nowhere/weights.safetensors")  # as on the driver of batch prediction
    assert build_meta_towers(elsewhere).preprocessing == preprocessing
    rows = pa.table({"image": [*map(png, photos), images[-1]]})
    assert np.array_equal(decode_rows(rows, None, "ink", ["ink"], preprocessing)["pixels"], pixels.numpy())


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
