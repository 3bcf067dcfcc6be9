"""Image towers of each family: equal to open_clip's without prompts, to a plain concatenation with them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from saved_bytes import saved_bytes
from small_clip import CLASS_NAMES, PREPROCESSING, tokenizer
from small_families import FAMILIES, black_box, reference_features, small_model
from small_methods import FITTED, fit

from pipeline.clip.chunks import activation_bytes
from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.methods.registry import METHODS

TOLERANCE = dict(rtol=1e-9, atol=1e-9)


def images_of(towers: ClipTowers, count: int) -> torch.Tensor:
    generator, size = torch.Generator().manual_seed(1), towers.visual.image_size
    sides = size if isinstance(size, tuple) else (size, size)
    return torch.randn(count, 3, *sides, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("memory_gib", [math.inf, 1e-6], ids=["at once", "in chunks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_without_prompts_equal_open_clip(family, memory_gib):
    model = small_model(family)
    towers = ClipTowers(model, tokenizer(), PREPROCESSING, activation_memory_gib=memory_gib)
    images = images_of(towers, 3)
    torch.testing.assert_close(towers.encode_image(images), model.encode_image(images), **TOLERANCE)


@pytest.mark.parametrize("depth, memory_gib", [(1, math.inf), (2, 1e-6), (3, math.inf)], ids=["1", "2, chunks", "3"])
@pytest.mark.parametrize("propagate", [False, True], ids=["replaced", "propagated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompted_features_and_gradients_equal_concatenation(family, propagate, depth, memory_gib):
    """Two tasks with prompts of their own."""
    model = small_model(family)
    towers = ClipTowers(model, tokenizer(), PREPROCESSING, activation_memory_gib=memory_gib)
    images, counts = images_of(towers, 5), [2, 3]
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randn(
        2, depth, 4, towers.vision_width, generator=generator, dtype=torch.float64, requires_grad=True
    )
    weights = torch.randn(5, towers.embed_dim, generator=generator, dtype=torch.float64)

    features = towers.encode_image(images, prompts, counts, propagate)
    (gradient,) = torch.autograd.grad((features * weights).sum(), prompts)
    expected = torch.cat(
        [reference_features(model, part, task, propagate) for part, task in zip(images.split(counts), prompts)]
    )
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), prompts)
    torch.testing.assert_close(features, expected, **TOLERANCE)
    torch.testing.assert_close(gradient, expected_gradient, **TOLERANCE)
    assert (gradient != 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_updates_equal_updated_matrices(family):
    model = small_model(family)
    towers = ClipTowers(model, tokenizer(), PREPROCESSING)
    method = METHODS["clip_lora"].build(Config(), towers, {"ink": CLASS_NAMES}).double()
    images = images_of(towers, 3)
    torch.testing.assert_close(method().encode_image(towers, images, [3]), model.encode_image(images), **TOLERANCE)
    generator = torch.Generator().manual_seed(3)
    model = small_model(family)  # the method's towers share the memory of the other
    blocks = model.visual.trunk.blocks if hasattr(model.visual, "trunk") else model.visual.transformer.resblocks
    with torch.no_grad():
        for described, block in zip(method.towers.vision_blocks, blocks, strict=True):
            update = described.attention.in_proj_update
            update.up.copy_(torch.randn(update.up.shape, generator=generator, dtype=torch.float64))
            downs = update.down.weight.split(update.up.shape[-1])
            changes = [update.scaling * up @ down for up, down in zip(update.up, downs)]
            attention = block.attn
            if hasattr(attention, "in_proj_weight"):
                attention.in_proj_weight += torch.cat(changes)
            elif attention.qkv is not None:
                attention.qkv.weight += torch.cat(changes)
            else:
                for layer, change in zip((attention.q_proj, attention.k_proj, attention.v_proj), changes):
                    layer.weight += change
    torch.testing.assert_close(method().encode_image(towers, images, [3]), model.encode_image(images), **TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["SigLIP", "EVA02", "EVA02, post-norm", "PE"])
def test_every_method_trains_all_of_its_parameters(family, name):
    towers = ClipTowers(small_model(family), tokenizer(), PREPROCESSING)
    config = Config.model_validate({"maple": {"depth": 2}, "promptsrc": {"depth": 2}, "tcp": {"class_layer": 2}})
    class_names = {"ink": CLASS_NAMES, "neon": CLASS_NAMES[:2]}
    kind = METHODS[name]
    kind.check(config, towers)
    method = kind.build(config, towers, class_names).double()
    if name in FITTED:
        fit(method, towers, class_names)
    tokens = kind.tokenize(config, towers.tokenizer, class_names)
    adaptation = method()
    x = adaptation.encode_image(towers, images_of(towers, 4), [2, 2]).split(2)
    z = tokens.pool_names_to_classes(adaptation.encode_text(towers, tokens))
    logits = [adaptation.logits(towers, *features, task) for task, features in enumerate(zip(x, z))]
    loss = torch.stack([scores.logsumexp(1).sum() for scores in logits]).sum()
    parameters = dict(method.named_parameters())
    assert bool(parameters) == kind.has_parameters()
    if not kind.takes_steps:
        return
    loss.backward()
    unused = {key for key, value in parameters.items() if value.grad is None or not value.grad.any()}
    if name == "two_stage":
        unused.remove("weights")  # of the second stage
    assert not {key for key in unused if not key.endswith(("up", "down", "down.weight"))}


@pytest.mark.parametrize("family", ["ViT with CLS", "SigLIP", "EVA02", "EVA02, post-norm", "CLIPA"])
def test_planned_activation_bytes_bound_what_autograd_saves(family):
    towers = ClipTowers(small_model(family, embed_dim=96, num_heads=4, depth=6).float(), tokenizer(), PREPROCESSING)
    images = torch.randn(8, 3, 16, 16)
    prompts = torch.randn(1, 6, 4, 96, requires_grad=True)
    saved = [saved_bytes(towers, partial(towers.encode_image, images[:n], prompts, [n])) for n in (4, 8)]
    per_image = (saved[1] - saved[0]) / 4
    tokens = towers.image_tower.num_tokens
    layers = 6 + towers.image_tower.pool_layers
    planned = activation_bytes(towers.vision_blocks, tokens, tokens + 4, towers.logit_scale, layers)
    assert per_image <= planned * 1.01
    assert planned == pytest.approx(per_image, rel=0.35)


def test_a_tower_without_tokens_gives_its_features_in_chunks_within_the_memory():
    model = black_box()
    towers = ClipTowers(model, tokenizer(), PREPROCESSING)
    images = images_of(towers, 6)
    expected = model.encode_image(images)
    torch.testing.assert_close(towers.encode_image(images), expected, **TOLERANCE)
    assert not towers.takes_image_prompts
    total = saved_bytes(towers.requires_grad_(True), lambda: towers.encode_image(images))
    sizes: list[int] = []
    towers.visual.attnpool.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    towers.activation_memory_gib = total / 2 / 2**30
    chunked = towers.encode_image(images)
    assert len(sizes) > 1 and sum(sizes[-len(sizes) :]) >= 6
    torch.testing.assert_close(chunked, expected, **TOLERANCE)


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if not kind.needs_image_layers()])
def test_methods_that_leave_the_image_layers_alone_take_a_tower_without_tokens(name):
    towers = ClipTowers(black_box(), tokenizer(), PREPROCESSING)
    class_names = {"ink": CLASS_NAMES}
    config = Config.model_validate({"tcp": {"class_layer": 2}})
    method = METHODS[name].build(config, towers, class_names).double()
    if name in FITTED:
        fit(method, towers, class_names)
    adaptation = method()
    x = adaptation.encode_image(towers, images_of(towers, 2), [2])
    z = adaptation.encode_text(towers, METHODS[name].tokenize(config, towers.tokenizer, class_names))
    loss = adaptation.logits(towers, x, z).logsumexp(1).sum()
    if METHODS[name].takes_steps:
        loss.backward()
        assert any(value.grad is not None and value.grad.any() for value in method.parameters())
