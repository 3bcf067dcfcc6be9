"""Text towers and tokenizers of all families, against open_clip and a plain concatenation of prompts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference_text_towers import reference_encode_text
from small_clip import CLASS_NAMES
from small_methods import SMALL, add_frozen_features
from small_problem import CONFIG, TASKS, small_problem
from small_text_towers import FAMILIES, small_text_towers

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.precision import autocast
from pipeline.errors import UserError
from pipeline.methods.registry import METHODS
from pipeline.training.trainer import Trainer

TOLERANCE = dict(rtol=1e-9, atol=1e-9)
SMALLEST_CHUNKS = 1e-9  # GiB: one class
TEMPLATES = ["a photo of a {}.", "{}", "This is a BLURRY picture of the word “{}”, in a drawing."]
NAMES_PER_TASK = [
    ["cat | Kitty-cat | the cat", "tricycle", "Great Wall of China | China's great wall"],
    ["x", "alarm_clock"],
    ["café", "Fußball | soccer", "猫"],
]
TEXTS = [
    "a",
    "A photo of a CAT!",
    "  two   spaces\tand a tab ",
    "under_score, hyphen-ated;",
    "'quoted' (in brackets)",
    "café naïve Fußball Ελλάδα",
    "猫 の 写真",
    "¡señor! 50 % of 12",
    "&amp; &lt;b&gt;",
    "zebra 🦓",
    "",
]


def texts_per_task() -> list[list[str]]:
    """Return the text of each name, task by task."""
    return [
        [template.format(name) for class_name in names for name in class_name.split(" | ")]
        for template, names in zip(TEMPLATES, NAMES_PER_TASK)
    ]


def random_prompts(towers, depth: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(depth)
    shape = (len(NAMES_PER_TASK), depth, 3, towers.text_width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same_features_and_gradients(features, reference, parameters):
    torch.testing.assert_close(features, reference, **TOLERANCE)
    weights = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours, plain = (
        torch.autograd.grad((weights * z).sum(), parameters, retain_graph=True, allow_unused=True)
        for z in (features, reference)
    )
    for gradient, expected in zip(ours, plain):
        assert (gradient is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(gradient, expected, **TOLERANCE)
    assert sum(gradient is not None for gradient in ours) > len(parameters) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_are_those_of_open_clips_tokenizer(family):
    towers, _, tokenizer = small_text_towers(family)
    ours, texts = towers.tokenizer, [*TEXTS, *sum(texts_per_task(), [])]
    assert len(ours.begin) == FAMILIES[family].num_begin and len(ours.end) == 1
    for text, expected in zip(texts, tokenizer(texts).tolist(), strict=True):
        ids = [*ours.begin, *ours.encode(text), *ours.end]
        assert ids + [ours.pad_id] * (ours.context_length - len(ids)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_has_the_tokens_that_it_has_in_a_text(family):
    tokenizer = small_text_towers(family)[0].tokenizer
    for name in ("cat", "Tricycle", "12 couches", "café"):
        text = tokenizer.encode(f"a photo of the {name}")
        assert text == tokenizer.encode("a photo of the") + tokenizer.encode_name(name)
    assert "".join(map(tokenizer.subword, tokenizer.encode_name("zebra"))).replace("##", "").startswith("zebra")


@pytest.mark.parametrize("family", FAMILIES)
def test_features_without_prompts_are_those_of_open_clip(family):
    towers, model, tokenizer = small_text_towers(family)
    towers.text.requires_grad_(True)
    tokens = class_tokens(towers.tokenizer, TEMPLATES, NAMES_PER_TASK)
    reference = model.encode_text(tokenizer(sum(texts_per_task(), [])))
    for towers.activation_memory_gib in (math.inf, SMALLEST_CHUNKS):
        assert_same_features_and_gradients(towers.encode_text(tokens), reference, list(towers.text.parameters()))


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("propagate", [False, True], ids=["replaced", "propagated"])
@pytest.mark.parametrize("text_prompt_position", ["after_sos", "before_sos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompted_features_equal_a_plain_concatenation(family, text_prompt_position, propagate, depth):
    towers, model, tokenizer = small_text_towers(family, text_prompt_position)
    start = FAMILIES[family].num_begin if text_prompt_position == "after_sos" else 0
    prompts = random_prompts(towers, depth)
    tokens = class_tokens(towers.tokenizer, TEMPLATES, NAMES_PER_TASK, num_prompt_positions=3)
    reference = torch.cat(
        [
            reference_encode_text(model, tokenizer(texts), task_prompts, start, propagate)
            for texts, task_prompts in zip(texts_per_task(), prompts)
        ]
    )
    for towers.activation_memory_gib in (math.inf, SMALLEST_CHUNKS):
        features = towers.encode_text(tokens, prompts, propagate)
        assert_same_features_and_gradients(features, reference, [prompts])


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("text_prompt_position", ["after_sos", "before_sos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_class_prompts_replace_the_propagated_prompts_before_a_layer(family, text_prompt_position, layer):
    towers, model, tokenizer = small_text_towers(family, text_prompt_position)
    start = FAMILIES[family].num_begin if text_prompt_position == "after_sos" else 0
    prompts = random_prompts(towers, 1)
    tokens = class_tokens(towers.tokenizer, TEMPLATES, NAMES_PER_TASK, num_prompt_positions=3)
    class_prompts = torch.randn(len(tokens.suffix), 3, towers.text_width, dtype=torch.float64, requires_grad=True)
    reference = torch.cat(
        [
            reference_encode_text(
                model, tokenizer(texts), task_prompts, start, True, class_prompts=(layer, own_prompts)
            )
            for texts, task_prompts, own_prompts in zip(
                texts_per_task(), prompts, class_prompts.split(tokens.rows_per_task)
            )
        ]
    )
    for towers.activation_memory_gib in (math.inf, SMALLEST_CHUNKS):
        features = towers.encode_text(tokens, prompts, True, class_prompts=(layer, class_prompts))
        assert_same_features_and_gradients(features, reference, [prompts, class_prompts])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_runs_only_where_it_is_seen(family):
    towers, _, _ = small_text_towers(family)
    tokens = class_tokens(towers.tokenizer, TEMPLATES[0], [["cat", "tricycle"]])
    length = tokens.prefix.shape[1] + tokens.suffix.shape[1]
    is_padded = family in ("SigLIP", "SigLIP2", "CLIPA", "MobileCLIP")
    assert (length == towers.tokenizer.context_length) == is_padded


@pytest.mark.parametrize("family", ["SigLIP", "SigLIP2", "BiomedCLIP"])
def test_coop_and_lamm_equal_their_definitions(family):
    towers, model, tokenizer = small_text_towers(family)
    words, start = {"ink": CLASS_NAMES}, FAMILIES[family].num_begin
    context_length = towers.tokenizer.context_length
    coop = METHODS["coop"].build(SMALL, towers, words).double()
    tokens = METHODS["coop"].tokenize(SMALL, towers.tokenizer, words)
    assert_same_features_and_gradients(
        coop().encode_text(towers, tokens),
        reference_encode_text(model, tokenizer([f"{name}." for name in CLASS_NAMES]), coop.context[None], start, True),
        list(coop.parameters()),
    )
    lamm = METHODS["lamm"].build(SMALL, towers, words).double()
    texts = tokenizer([f"a photo of a {name}." for name in CLASS_NAMES])
    name_start = start + len(towers.tokenizer.encode("a photo of a"))
    name_stop = name_start + lamm.embeddings.shape[1]
    embeddings = towers.token_embedding(texts)
    torch.testing.assert_close(lamm.embeddings.detach(), embeddings[:, name_start:name_stop], **TOLERANCE)
    with torch.no_grad():
        lamm.embeddings.add_(torch.randn_like(lamm.embeddings))
    embeddings = torch.cat([embeddings[:, :name_start], lamm.embeddings, embeddings[:, name_stop:]], dim=1)
    assert embeddings.shape[1] == context_length
    assert_same_features_and_gradients(
        lamm().encode_text(towers, METHODS["lamm"].tokenize(SMALL, towers.tokenizer, words)),
        reference_encode_text(model, texts, None, start, embeddings=embeddings),
        list(lamm.parameters()),
    )


def test_a_training_step_is_that_of_the_definition():
    towers, model, tokenizer = small_text_towers("SigLIP2")
    config = CONFIG.model_copy(update={"epochs": 1, "batch_size": 10, "warmup_epochs": 0, "weight_decay": 0.0})
    sets = add_frozen_features(towers, small_problem()[-1], config)
    words = dict.fromkeys(TASKS, CLASS_NAMES)
    method, slow = (METHODS["coop"].build(SMALL, towers, words).double() for _ in range(2))
    tokens = METHODS["coop"].tokenize(SMALL, towers.tokenizer, words)
    (record,) = Trainer(towers, method, sets, tokens, config, epochs=1, seed=5).train()
    ids = tokenizer([f"{name}." for name in CLASS_NAMES])
    losses = []
    for task_set in sets:
        pixels, (labels,) = task_set.batch(0, 10, towers.preprocessing, config.augmentation, 5)
        x = model.encode_image(towers.normalize_pixels(pixels))
        z = reference_encode_text(model, ids, slow.context[None], 0, propagate=True)
        losses.append(F.cross_entropy(towers.logits(x, z), labels))
    sum(losses).backward()
    assert record.losses == pytest.approx([loss.item() for loss in losses], rel=1e-9)
    stepped = slow.context - config.learning_rate * slow.context.grad
    assert (method.context - slow.context).abs().max() > 1e-6
    torch.testing.assert_close(method.context, stepped, **TOLERANCE)


@pytest.mark.parametrize("propagate", [False, True], ids=["replaced", "propagated"])
@pytest.mark.parametrize("family", ["SigLIP", "BERT's pooler", "XLM-RoBERTa"])
def test_matrices_cast_to_bfloat16_equal_autocast(family, propagate):
    features = []
    for is_cast in (False, True):
        towers = small_text_towers(family)[0].float()
        if is_cast:
            towers.cast_weights_to_bfloat16()
        tokens = class_tokens(towers.tokenizer, TEMPLATES, NAMES_PER_TASK, num_prompt_positions=3)
        with autocast(towers, "bfloat16"):
            features.append(towers.encode_text(tokens, random_prompts(towers, 2).float(), propagate))
    assert torch.equal(*features)


def test_a_name_without_tokens_or_a_text_that_is_too_long_is_refused():
    tokenizer = small_text_towers("SigLIP2")[0].tokenizer
    with pytest.raises(UserError, match=r"class name '!\?' has no tokens .* --data.class_names"):
        class_tokens(tokenizer, TEMPLATES[0], [["cat", "!?"]])
    with pytest.raises(UserError, match="'Cat' and 'cat!' have the same tokens"):
        class_tokens(tokenizer, TEMPLATES[0], [["Cat", "cat!"]])
    class_tokens(tokenizer, "{}", [[" ".join(["a"] * 63)]])
    with pytest.raises(UserError, match="has 63 tokens and 2 prompts; the model's context length is 64"):
        class_tokens(tokenizer, "{}", [[" ".join(["a"] * 62)]], 2)
