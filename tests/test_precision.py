"""Where the towers compute in bfloat16, and how far its results are from float32's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_clip import CLASS_NAMES, small_towers
from small_methods import SMALL, build_method
from small_problem import CONFIG, TEMPLATE, group_prompts, small_problem

import pipeline
from pipeline.clip import precision as precision_module
from pipeline.clip.blocks import attention
from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.load import load_clip, weights_fingerprint
from pipeline.clip.precision import LARGE_EMBED_DIM, autocast, uses_bfloat16
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter, save_adapter
from pipeline.prediction.load import MLFLOW_ADAPTER, read_model
from pipeline.prediction.mlflow_model import saved_mlflow_model
from pipeline.serving.shared_clip import load_models
from pipeline.training import frozen_features
from pipeline.training.trainer import Trainer

GROUP = {"ink": ["one", "two", "three"]}


@pytest.fixture
def amx(monkeypatch):
    """A processor with AMX, which it computes like any other, for which every tower is large."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(precision_module, "LARGE_EMBED_DIM", 1)
    load_clip.cache_clear()


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("embed_dim", [LARGE_EMBED_DIM - 1, LARGE_EMBED_DIM])
def test_auto_is_bfloat16_only_for_the_inference_of_large_towers_on_amx(monkeypatch, has_amx, inference, embed_dim):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    towers = SimpleNamespace(device=torch.device("cpu"), embed_dim=embed_dim)
    is_large = embed_dim == LARGE_EMBED_DIM
    assert uses_bfloat16(towers, "auto", inference) == (has_amx and inference and is_large)
    assert uses_bfloat16(towers, "bfloat16", inference) and not uses_bfloat16(towers, "float32", inference)


@pytest.mark.parametrize("supported", [False, True])
def test_auto_is_bfloat16_on_gpus_that_support_it(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    towers = SimpleNamespace(device=torch.device("cuda"), embed_dim=1)
    assert uses_bfloat16(towers, "auto") == uses_bfloat16(towers, "auto", inference=True) == supported


def test_training_does_not_depend_on_the_processor(request):
    """Nor do the losses of training images, from which tasks are grouped."""
    _, _, tokens, sets = small_problem()
    losses = []
    for _ in range(2):
        towers = small_towers(dtype=torch.float32)[0]
        history = Trainer(towers, group_prompts(towers).float(), sets, tokens, CONFIG, epochs=1, seed=5).train()
        losses.append([record.losses for record in history])
        if len(losses) == 1:
            request.getfixturevalue("amx")
    assert uses_bfloat16(towers, "auto", inference=True)
    assert losses[0] == losses[1]


def test_test_images_are_encoded_as_in_evaluation_and_training_images_as_in_training(monkeypatch, amx):
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(frozen_features, "decoded_batches", lambda *_, **__: [("clipart", range(4), pixels)])
    towers = small_towers(dtype=torch.float32)[0]
    for split in ("train", "test"):
        auto, float32, bfloat16 = (
            frozen_features.frozen_split_features(towers, None, "clipart", 1, precision, split=split)
            for precision in ("auto", "float32", "bfloat16")
        )
        assert not torch.equal(float32.float(), bfloat16.float())
        assert torch.equal(auto, bfloat16 if split == "test" else float32)


@pytest.fixture
def adapter_file(tmp_path):
    towers = load_clip(SMALL.clip)
    state = build_method("mmap", towers, GROUP).state_dict()
    file = tmp_path / "adapter.safetensors"
    save_adapter(file, TrainedAdapter("mmap", SMALL, weights_fingerprint(towers), (GROUP,), (state,)))
    return file


def test_a_precision_is_chosen_saved_and_used_by_every_interface(adapter_file, amx):
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def probabilities(model):
        return torch.tensor([list(p.probabilities.values()) for p in model.predict_pixels(pixels)])

    loaded = {
        precision: pipeline.load(adapter_file, precision=precision) for precision in (None, "float32", "bfloat16")
    }
    float32, bfloat16 = probabilities(loaded["float32"]), probabilities(loaded["bfloat16"])
    assert torch.equal(probabilities(loaded[None]), bfloat16)  # auto, of its config
    assert 0 < (float32 - bfloat16).abs().max() < 0.03
    assert loaded["bfloat16"].classifier.towers.visual.conv1.weight.dtype == torch.bfloat16
    assert loaded["float32"].classifier.towers.visual.conv1.weight.dtype == torch.float32

    loaded["float32"].save_options()
    assert torch.equal(probabilities(pipeline.load(adapter_file)), float32)
    served = load_models({"a": read_model(adapter_file)[:2]}, "cpu")["a"]
    assert torch.equal(probabilities(served), float32)
    for precision, expected in ((None, float32), ("bfloat16", bfloat16)):
        with saved_mlflow_model(adapter_file, precision=precision) as folder:
            assert torch.equal(probabilities(pipeline.load(folder / MLFLOW_ADAPTER)), expected)


def test_an_unknown_precision_is_refused(adapter_file):
    with pytest.raises(UserError, match=r"precision='float16': .*'auto', 'float32' or 'bfloat16'"):
        pipeline.load(adapter_file, precision="float16")


def test_bfloat16_features_are_close_to_those_of_float32():
    """By the bound of docs/performance.md."""
    towers = small_towers(dtype=torch.float32, vision_width=128, text_width=128, vision_layers=12, text_layers=12)[0]
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_NAMES])
    features = {}
    for precision in ("float32", "bfloat16"):
        with torch.no_grad(), autocast(towers, precision):
            features[precision] = towers.encode_image(images).float(), towers.encode_text(tokens).float()
    for ours, exact in zip(features["bfloat16"], features["float32"]):
        assert F.cosine_similarity(ours, exact).min() > 0.9995


def test_gradients_of_attention_in_bfloat16_are_those_of_its_rounded_inputs():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 3, 5, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in rows]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with torch.autocast("cpu", torch.bfloat16):
        attended = attention(*rows, mask)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    assert attended.dtype == torch.bfloat16
    torch.testing.assert_close(attended.double(), expected, rtol=2**-8, atol=1e-6)  # one rounding
    upstream = torch.randn(2, 3, 5, 8, generator=generator).bfloat16()
    gradients = torch.autograd.grad(attended, rows, upstream)
    for ours, reference in zip(gradients, torch.autograd.grad(expected, exact, upstream.double())):
        torch.testing.assert_close(ours.double(), reference, rtol=2**-8, atol=1e-6)
