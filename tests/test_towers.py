"""The towers' exact shortcuts against the reference implementation and open_clip."""

from __future__ import annotations

import math

import pytest
import torch
from reference_towers import reference_encode_image, reference_encode_text
from saved_bytes import saved_bytes
from small_clip import CLASS_NAMES, PREPROCESSING, small_open_clip, small_towers, tokenizer

from pipeline.clip.chunks import activation_bytes
from pipeline.clip.class_tokens import class_tokens, counts_in_range
from pipeline.clip.precision import autocast
from pipeline.clip.tokenizer import describe_tokenizer
from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.methods.clip_lora import ClipLora
from pipeline.methods.clip_svd import ClipSvd

TEMPLATE = "a photo of a {}."
TOLERANCE = dict(rtol=1e-9, atol=1e-9)
CLASS_NAMES_PER_TASK = [CLASS_NAMES, CLASS_NAMES[:2], ["cat"]]


def full_ids(words):
    return tokenizer()([TEMPLATE.format(name) for name in words])


def random_prompts(tasks, depth, length, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, depth, length, width, generator=generator, dtype=torch.float64).requires_grad_()


IMAGES_PER_TASK = [2, 1, 3]
SMALLEST_CHUNKS = 1e-9  # GiB: one image, one class


def ours_and_plain(towers, model, text_prompts, vision_prompts, propagate):
    """Return image and text features of three tasks, ours and the reference's."""
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = class_tokens(towers.tokenizer, TEMPLATE, CLASS_NAMES_PER_TASK)
    ours = (
        towers.encode_image(images, vision_prompts, IMAGES_PER_TASK, propagate),
        towers.encode_text(tokens, text_prompts, propagate),
    )
    no_prompts = [None] * len(CLASS_NAMES_PER_TASK)
    plain = (
        torch.cat(
            [
                reference_encode_image(model, part, prompts, propagate)
                for part, prompts in zip(
                    images.split(IMAGES_PER_TASK), no_prompts if vision_prompts is None else vision_prompts
                )
            ]
        ),
        torch.cat(
            [
                reference_encode_text(model, full_ids(words), prompts, towers.prompts_before_sos, propagate)
                for words, prompts in zip(CLASS_NAMES_PER_TASK, no_prompts if text_prompts is None else text_prompts)
            ]
        ),
    )
    return ours, plain


def assert_same_features_and_gradients(ours, plain, parameters):
    gradients = []
    for features, reference in zip(ours, plain):
        torch.testing.assert_close(features, reference, **TOLERANCE)
    for features in (ours, plain):
        weights = [torch.randn(f.shape, dtype=f.dtype, generator=torch.Generator().manual_seed(9)) for f in features]
        total = sum((weight * f).sum() for weight, f in zip(weights, features))
        gradients.append(torch.autograd.grad(total, parameters))
    for gradient, reference in zip(*gradients):
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(gradient, reference, **TOLERANCE)


@pytest.mark.parametrize("activation_memory_gib", [math.inf, SMALLEST_CHUNKS], ids=["total_bytes", "chunks"])
@pytest.mark.parametrize("propagate", [False, True], ids=["replaced", "propagate"])
@pytest.mark.parametrize("depth", [1, 2, None])
@pytest.mark.parametrize("text_prompt_position", ["after_sos", "before_sos"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(vision_width=16, text_width=32, vision_layers=3, text_layers=4, quick_gelu=False),
        dict(custom_text=True, layer_scale=0.5),
        dict(vision_layers=1, text_layers=1),
    ],
    ids=["deeper-vision", "deeper-text", "custom-text-layer-scale", "one-layer"],
)
def test_prompted_towers_equal_the_reference(options, text_prompt_position, depth, propagate, activation_memory_gib):
    towers, model = small_towers(text_prompt_position, **options)
    towers.activation_memory_gib = activation_memory_gib
    deepest = min(towers.text_depth, towers.vision_depth)
    depth = min(depth or deepest, deepest)
    text_prompts = random_prompts(3, depth, 4, towers.text_width, 2)
    vision_prompts = random_prompts(3, depth, 4, towers.vision_width, 3)
    ours, plain = ours_and_plain(towers, model, text_prompts, vision_prompts, propagate)
    assert_same_features_and_gradients(ours, plain, [text_prompts, vision_prompts])


@pytest.mark.parametrize("activation_memory_gib", [math.inf, SMALLEST_CHUNKS], ids=["total_bytes", "chunks"])
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(custom_text=True, quick_gelu=False, layer_scale=0.5)])
def test_gradients_of_trained_weights_equal_the_reference(options, prompted, activation_memory_gib):
    towers, model = small_towers(**options)
    towers.activation_memory_gib = activation_memory_gib
    towers.requires_grad_(True).logit_scale.requires_grad_(False)
    text_prompts = random_prompts(3, 2, 4, towers.text_width, 2) if prompted else None
    vision_prompts = random_prompts(3, 2, 4, towers.vision_width, 3) if prompted else None
    parameters = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    assert len(parameters) > 60
    ours, plain = ours_and_plain(towers, model, text_prompts, vision_prompts, False)
    assert_same_features_and_gradients(ours, plain, parameters)


NUM_ROWS = 30


def saved_bytes_per_row(towers, encode):
    """Return the saved bytes that grow with the rows, per row."""
    half = NUM_ROWS // 2
    return (saved_bytes(towers, encode) - saved_bytes(towers, lambda: encode(half))) / (NUM_ROWS - half)


def wide_towers(trained, precision, quick_gelu=True):
    """Return towers dominated by activations, and for each: a function that encodes some of NUM_ROWS rows, its blocks,
    the tokens of a row, and their keys."""
    towers, _ = small_towers(
        quick_gelu=quick_gelu, vision_width=64, text_width=64, vision_layers=6, text_layers=6, dtype=torch.float32
    )
    towers.requires_grad_(trained == "weights")
    if precision == "bfloat16" and trained not in ("weights", "singular values"):
        towers.cast_weights_to_bfloat16()
    if trained == "low-rank updates":
        towers = ClipLora(Config(), towers, []).towers
    if trained == "singular values":
        towers = ClipSvd(Config(), towers, [])().towers
    words = [[f"{color} {name}" for color in ("red", "green", "old") for name in CLASS_NAMES]] * 2
    tokens = class_tokens(towers.tokenizer, TEMPLATE, words)
    text_prompts = random_prompts(2, 6, 4, 64, 1).float()
    vision_prompts = random_prompts(2, 6, 4, 64, 2).float()
    images = torch.randn(NUM_ROWS, 3, 16, 16).to(towers.visual.conv1.weight.dtype)

    def encode_text(count=NUM_ROWS):
        with autocast(towers, precision):
            return towers.encode_text(tokens.slice_rows(0, count), text_prompts)

    def encode_images(count=NUM_ROWS):
        with autocast(towers, precision):
            return towers.encode_image(images[:count], vision_prompts, counts_in_range([15, 15], 0, count))

    num_suffix = tokens.suffix.shape[1]
    return towers, {
        "text": (encode_text, towers.text_blocks, num_suffix, num_suffix + 4 + 5),
        "vision": (encode_images, towers.vision_blocks, 5, 5 + 4),
    }


@pytest.mark.parametrize("precision, tolerance", [("float32", 0.2), ("bfloat16", 0.35)])
@pytest.mark.parametrize("trained", ["prompts", "weights", "low-rank updates", "singular values"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_planned_activation_bytes_match_what_autograd_saves(quick_gelu, trained, precision, tolerance):
    """A tower's plan is within 20 % of what autograd saves per row, somewhat more under autocast."""
    towers, rows_by_tower = wide_towers(trained, precision, quick_gelu)
    for encode, blocks, num_tokens, num_keys in rows_by_tower.values():
        saved = saved_bytes_per_row(towers, encode)
        with autocast(towers, precision):
            planned = activation_bytes(blocks, num_tokens, num_keys, towers.logit_scale)
        assert saved <= planned * 1.01
        assert planned == pytest.approx(saved, rel=tolerance)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("trained", ["prompts", "low-rank updates"])
def test_chunks_meet_the_memory_limit_and_are_as_few_as_possible(trained, tower, precision):
    towers, rows_by_tower = wide_towers(trained, precision)
    encode, *_ = rows_by_tower[tower]
    row_bytes, total_bytes = saved_bytes_per_row(towers, encode), saved_bytes(towers, encode)
    sizes = []
    last_norm = towers.text.ln_final if tower == "text" else towers.visual.ln_post
    last_norm.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    for share in (0.9, 0.4, 0.056, 0.001):
        allowed = NUM_ROWS * row_bytes * share
        towers.activation_memory_gib = allowed / 2**30
        sizes.clear()
        saved_between_chunks = saved_bytes(towers, encode)
        num_chunks = len(sizes)
        assert num_chunks > 1 and sum(sizes) == NUM_ROWS and max(sizes) - min(sizes) <= 1
        assert saved_between_chunks < 0.25 * total_bytes  # a chunk is recomputed in its backward pass
        assert max(sizes) * row_bytes <= allowed or max(sizes) == 1
        if num_chunks > 2:  # one chunk fewer would exceed the limit, by the plan
            assert math.ceil(NUM_ROWS / (num_chunks - 1)) * row_bytes * 1.35 > allowed


@pytest.mark.parametrize("options", [dict(), dict(custom_text=True, quick_gelu=False)])
def test_towers_without_prompts_equal_open_clip(options):
    towers, model = small_towers(**options)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_NAMES])
    torch.testing.assert_close(towers.encode_image(images), model.encode_image(images), **TOLERANCE)
    torch.testing.assert_close(towers.encode_text(tokens), model.encode_text(full_ids(CLASS_NAMES)), **TOLERANCE)
    x, z = towers.encode_image(images), towers.encode_text(tokens)
    torch.testing.assert_close(towers.logits(x, z), model.get_logits(images, full_ids(CLASS_NAMES))[0], **TOLERANCE)


def test_class_tokens_split_after_the_common_prefix():
    tokens = class_tokens(describe_tokenizer(tokenizer()), TEMPLATE, [CLASS_NAMES, ["cat", "dog"]])
    assert tokens.prefix.shape == (2, 5)  # SOS a photo of a
    assert tokens.classes_per_task == (5, 2)
    assert tokens.suffix.shape == (7, 7)  # the great wall of china . EOT
    full = full_ids(CLASS_NAMES)
    for row, eot, ids in zip(tokens.suffix, tokens.eot, full):
        assert torch.equal(row[: eot + 1], ids[5 : 5 + eot + 1])
        assert row[eot] == ids.max()


def test_class_tokens_reject_long_and_equal_texts():
    clip_tokenizer = describe_tokenizer(tokenizer())
    with pytest.raises(UserError, match="has 87 tokens.*context length is 77"):
        class_tokens(clip_tokenizer, TEMPLATE, [["cat", "dog " * 80]])
    with pytest.raises(UserError, match="has 8 tokens and 70 prompts; the model's context length is 77"):
        class_tokens(clip_tokenizer, TEMPLATE, [["cat"]], num_prompt_positions=70)
    with pytest.raises(UserError, match="'TV' and 'tv' have the same tokens"):
        class_tokens(clip_tokenizer, TEMPLATE, [["TV", "tv"]])


def test_models_that_cannot_take_prompts_are_refused():
    model = small_open_clip()
    model.text_pool_type = "last"
    with pytest.raises(UserError, match="not the end-of-text token"):
        ClipTowers(model, tokenizer(), PREPROCESSING)


def test_normalize_pixels():
    towers, _ = small_towers()
    pixels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert torch.allclose(towers.normalize_pixels(pixels), torch.tensor(2.0, dtype=torch.float64))
