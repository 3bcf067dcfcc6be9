"""The towers' exact shortcuts against the plain, concatenating, 77-token definition, and against open_clip itself."""

from __future__ import annotations

import pytest
import torch
from plain_towers import plain_encode_image, plain_encode_text
from small_clip import CLASS_WORDS, open_clip, small_open_clip, small_towers

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.towers import ClipTowers
from pipeline.errors import UserError

TEMPLATE = "a photo of a {}."
TOLERANCE = dict(rtol=1e-9, atol=1e-9)
WORDS_PER_TASK = [CLASS_WORDS, CLASS_WORDS[:2], ["cat"]]


def full_ids(words):
    return open_clip.SimpleTokenizer()([TEMPLATE.format(name) for name in words])


def random_prompts(tasks, depth, length, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, depth, length, width, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("text_order", ["after_sos", "before_sos"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(vision_width=16, text_width=32, vision_layers=2, text_layers=4, quick_gelu=False),
        dict(custom_text=True, layer_scale=0.5),
        dict(vision_layers=1, text_layers=1),
    ],
    ids=["deeper-vision", "deeper-text", "custom-text-layer-scale", "one-layer"],
)
def test_prompted_towers_equal_the_plain_definition(options, text_order):
    towers, model = small_towers(text_order, **options)
    depth, num_tasks, b = min(towers.text_depth, towers.vision_depth), 3, 4
    images_per_task = [2, 1, 3]
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    text_prompts = random_prompts(num_tasks, depth, b, towers.text_width, 2)
    vision_prompts = random_prompts(num_tasks, depth, b, towers.vision_width, 3)
    tokens = class_tokens(towers.tokenizer, TEMPLATE, WORDS_PER_TASK)

    x = towers.encode_image(images, vision_prompts, images_per_task)
    z = towers.encode_text(tokens, text_prompts)
    x_plain = torch.cat(
        [plain_encode_image(model, part, vision_prompts[t]) for t, part in enumerate(images.split(images_per_task))]
    )
    z_plain = torch.cat(
        [
            plain_encode_text(model, full_ids(words), text_prompts[t], before_sos=text_order == "before_sos")
            for t, words in enumerate(WORDS_PER_TASK)
        ]
    )
    torch.testing.assert_close(x, x_plain, **TOLERANCE)
    torch.testing.assert_close(z, z_plain, **TOLERANCE)

    weight_x, weight_z = torch.randn_like(x), torch.randn_like(z)
    ours = torch.autograd.grad((x * weight_x).sum() + (z * weight_z).sum(), [text_prompts, vision_prompts])
    plain = torch.autograd.grad((x_plain * weight_x).sum() + (z_plain * weight_z).sum(), [text_prompts, vision_prompts])
    for gradient, reference in zip(ours, plain):
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(gradient, reference, **TOLERANCE)


@pytest.mark.parametrize("depth", [1, 2])
def test_prompts_for_the_first_layers_only(depth):
    towers, model = small_towers(vision_layers=4, text_layers=3)
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_WORDS])
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    text_prompts = random_prompts(1, depth, 3, towers.text_width, 4)
    vision_prompts = random_prompts(1, depth, 3, towers.vision_width, 5)
    torch.testing.assert_close(
        towers.encode_image(images, vision_prompts, [2]),
        plain_encode_image(model, images, vision_prompts[0]),
        **TOLERANCE,
    )
    torch.testing.assert_close(
        towers.encode_text(tokens, text_prompts),
        plain_encode_text(model, full_ids(CLASS_WORDS), text_prompts[0]),
        **TOLERANCE,
    )


@pytest.mark.parametrize("options", [dict(), dict(custom_text=True, quick_gelu=False)])
def test_without_prompts_the_towers_are_open_clips(options):
    towers, model = small_towers(**options)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    tokens = class_tokens(towers.tokenizer, TEMPLATE, [CLASS_WORDS])
    torch.testing.assert_close(towers.encode_image(images), model.encode_image(images), **TOLERANCE)
    torch.testing.assert_close(towers.encode_text(tokens), model.encode_text(full_ids(CLASS_WORDS)), **TOLERANCE)
    x, z = towers.encode_image(images), towers.encode_text(tokens)
    torch.testing.assert_close(towers.logits(x, z), model.get_logits(images, full_ids(CLASS_WORDS))[0], **TOLERANCE)


def test_class_tokens_cut_at_the_shared_words_and_at_the_longest_name():
    tokens = class_tokens(open_clip.SimpleTokenizer(), TEMPLATE, [CLASS_WORDS, ["cat", "dog"]])
    assert tokens.prefix.shape == (2, 5)  # SOS a photo of a
    assert tokens.classes_per_task == (5, 2)
    assert tokens.suffix.shape == (7, 7)  # the great wall of china . EOT
    full = full_ids(CLASS_WORDS)
    for row, eot, ids in zip(tokens.suffix, tokens.eot, full):
        assert torch.equal(row[: eot + 1], ids[5 : 5 + eot + 1])
        assert row[eot] == ids.max()


def test_class_tokens_refuse_what_the_model_cannot_tell_apart():
    tokenizer = open_clip.SimpleTokenizer()
    with pytest.raises(UserError, match="takes 87 tokens.*reads 77"):
        class_tokens(tokenizer, TEMPLATE, [["cat", "dog " * 80]])
    with pytest.raises(UserError, match="'TV' and 'tv' are the same"):
        class_tokens(tokenizer, TEMPLATE, [["TV", "tv"]])


def test_models_that_cannot_take_prompts_are_refused():
    model = small_open_clip()
    model.visual.pool_type = "avg"
    with pytest.raises(UserError, match="not the CLS token"):
        ClipTowers(model, open_clip.SimpleTokenizer())
    model = small_open_clip()
    model.text_pool_type = "last"
    with pytest.raises(UserError, match="not the end-of-text token"):
        ClipTowers(model, open_clip.SimpleTokenizer())


def test_normalize_pixels():
    towers, _ = small_towers()
    pixels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert torch.allclose(towers.normalize_pixels(pixels), torch.tensor(2.0, dtype=torch.float64))
