"""Templates of single tasks: exact in the towers and in every method, and saved with the adapter."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from reference_towers import reference_encode_text
from safetensors import safe_open
from small_clip import CLASS_NAMES, small_towers, tokenizer
from small_methods import REFERENCES, SMALL, build_method

from pipeline.clip.class_tokens import ClassTokens, class_tokens
from pipeline.clip.load import load_clip, weights_fingerprint
from pipeline.clip.tokenizer import describe_tokenizer
from pipeline.config import Config, parse_config
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, merge_adapters, save_adapter
from pipeline.methods.classifier import Classifier
from pipeline.methods.registry import METHODS
from pipeline.workflows.added_task import _check_compatible

TEMPLATES = ["a photo of a {}.", "a rough sketch that shows the {}, drawn by hand", "{} in a shop."]
WORDS = {"photo": CLASS_NAMES, "sketch": CLASS_NAMES[:2], "shop": ["cat", "alarm clock"]}
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


def config_with(**task_templates: str) -> Config:
    clip = SMALL.clip.model_copy(update={"task_templates": task_templates})
    return SMALL.model_copy(update={"clip": clip})


TASK_CONFIG = config_with(sketch=TEMPLATES[1], shop=TEMPLATES[2])


@pytest.mark.parametrize("propagate", [False, True], ids=["replaced", "propagate"])
@pytest.mark.parametrize("text_prompt_position", ["after_sos", "before_sos"])
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("templates", [TEMPLATES, TEMPLATES[:2] + ["a photo of the {}."], TEMPLATES[1::-1]])
def test_towers_equal_the_reference_with_a_template_per_task(templates, prompted, text_prompt_position, propagate):
    words = list(WORDS.values())[: len(templates)]
    towers, model = small_towers(text_prompt_position)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randn(len(words), 2, 4, towers.text_width, generator=generator, dtype=torch.float64)
    prompts.requires_grad_()
    tokens = class_tokens(towers.tokenizer, templates, words)
    ours = towers.encode_text(tokens, prompts if prompted else None, propagate and prompted)
    plain = torch.cat(
        [
            reference_encode_text(
                model,
                tokenizer()([template.format(name) for name in task_words]),
                prompts[task] if prompted else None,
                towers.prompts_before_sos,
                propagate and prompted,
            )
            for task, (template, task_words) in enumerate(zip(templates, words))
        ]
    )
    torch.testing.assert_close(ours, plain, **TOLERANCE)
    if prompted:
        weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        gradients, plain_gradients = (torch.autograd.grad((weights * z).sum(), prompts)[0] for z in (ours, plain))
        assert plain_gradients.abs().max() > 1e-6
        torch.testing.assert_close(gradients, plain_gradients, **TOLERANCE)


def test_the_prefix_is_the_shortest_of_all_templates():
    """The shortest beginning is that of all; the rest is each class's own."""
    tokens = class_tokens(describe_tokenizer(tokenizer()), TEMPLATES[:2], [["cat", "dog"]] * 2)
    num_words = [len(tokenizer().encode(template.partition("{}")[0])) for template in TEMPLATES[:2]]
    assert tokens.prefix.shape == (2, 1 + min(num_words))
    assert tokens.name_start == tuple(number - min(num_words) for number in num_words)
    for row, (template, name) in enumerate((t, n) for t in TEMPLATES[:2] for n in ("cat", "dog")):
        ids = tokens.prefix[row // 2].tolist() + tokens.suffix[row, : tokens.eot[row] + 1].tolist()
        assert ids == [49406, *tokenizer().encode(template.format(name)), 49407]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "hipro"])
def test_a_method_on_several_tasks_equals_each_task_by_itself(name):
    """test_methods.py compares one template with the reference. HiPro uses no words of a template, and has no context
    of a single task."""
    towers, _ = small_towers()
    method, kind = build_method(name, towers, WORDS, TASK_CONFIG), METHODS[name]
    with torch.no_grad():
        adaptation = method()
        features = adaptation.encode_text(towers, kind.tokenize(TASK_CONFIG, towers.tokenizer, WORDS))
        row = 0
        for index, (task, words) in enumerate(WORDS.items()):
            task_tokens = kind.tokenize(TASK_CONFIG, towers.tokenizer, {task: words})
            z = adaptation.for_task(index).encode_text(towers, replace(task_tokens, first_row=row))
            torch.testing.assert_close(features[row : row + len(words)], z, **TOLERANCE)
            row += len(words)
    assert row == len(features)


def ids_of(tokens: ClassTokens) -> list[list[int]]:
    """Return the ids of each text, from start token to EOT."""
    prefixes = [prefix.tolist() for prefix, count in zip(tokens.prefix, tokens.rows_per_task) for _ in range(count)]
    return [
        prefix + suffix[: eot + 1].tolist()
        for prefix, suffix, eot in zip(prefixes, tokens.suffix, tokens.eot, strict=True)
    ]


def text_ids(text: str, num_replaced: int = 0) -> list[int]:
    return [49406, *tokenizer().encode(text)[num_replaced:], 49407]


@pytest.mark.parametrize("name", METHODS)
def test_texts_of_a_method(name):
    expected = [REFERENCES[name].text(template, TASK_CONFIG) for template in TEMPLATES]
    texts = [text.format(word) for text, words in zip(expected, WORDS.values()) for word in words]
    assert ids_of(METHODS[name].tokenize(TASK_CONFIG, describe_tokenizer(tokenizer()), WORDS)) == list(
        map(text_ids, texts)
    )


@pytest.mark.parametrize(
    "template, num_replaced, expected",
    [
        ("a photo of a {}.", 2, 2),
        ("a photo of a {}.", 4, 4),
        ("a photo of a {}.", 9, 4),  # the name stays
        ("a tambourinist, that is a {}", 3, 3),  # ends within a word of several tokens
        ("{} texture.", 2, 0),
        ("some un{}", 2, 1),  # a word that merges with the name stays
    ],
)
def test_prompts_replace_the_first_tokens_of_a_template(template, num_replaced, expected):
    names = ["cat", "known", "happy | sad"]
    tokens = class_tokens(
        describe_tokenizer(tokenizer()), [TEMPLATES[0], template], [["cat"], names], num_replaced_tokens=num_replaced
    )
    texts = [template.format(name) for name in ("cat", "known", "happy", "sad")]
    assert ids_of(tokens)[1:] == [text_ids(text, expected) for text in texts]
    before_name = len(tokenizer().encode(template.partition("{}")[0])) - expected
    assert len(tokens.prefix[1]) + tokens.name_start[1] == 1 + before_name


@pytest.mark.parametrize("name", ["maple", "promptsrc"])
def test_prompts_start_as_the_template_of_their_tasks(name):
    towers, model = small_towers()
    for tasks, expected in ((["sketch"], "a rough"), (list(WORDS), "a photo"), (["shop"], None)):
        start = METHODS[name].build(TASK_CONFIG, towers, {task: WORDS[task] for task in tasks}).text_prompts[0]
        for words in ("a rough", "a photo"):
            embeddings = model.token_embedding(torch.tensor(tokenizer().encode(words)))
            assert torch.allclose(start.double(), embeddings, rtol=1e-6) == (words == expected)


def test_a_linear_probe_is_initialized_with_each_tasks_texts():
    towers, _ = small_towers()
    probe = METHODS["linear_probe"].build(TASK_CONFIG, towers, WORDS)
    tokens = class_tokens(towers.tokenizer, TEMPLATES, list(WORDS.values()))
    torch.testing.assert_close(probe().encode_text(towers, tokens), towers.encode_text(tokens), **TOLERANCE)
    assert len(probe.weights) == sum(map(len, WORDS.values()))
    shared = METHODS["linear_probe"].build(config_with(shop=TEMPLATES[2]), towers, WORDS)
    assert len(shared.weights) == len(CLASS_NAMES) + len(WORDS["shop"])  # sketch has classes of photo, by its template


@pytest.fixture(scope="module")
def clip():
    """The towers, which no template changes, and their fingerprint."""
    towers = load_clip(SMALL.clip)
    return towers, weights_fingerprint(towers)


@pytest.mark.parametrize("name", METHODS)
def test_adapters_store_the_templates_of_their_tasks(name, clip, tmp_path):
    config = config_with(neon="a neon sign of a {}", other="not of {} these")
    towers, fingerprint = clip
    words = {"ink": ["one", "two"], "neon": ["one", "two", "three"]}
    method = build_method(name, towers, words, config)
    trained = TrainedAdapter(name, config, fingerprint, (words,), (method.state_dict(),))
    save_adapter(tmp_path / "trained.safetensors", trained)
    loaded = load_adapter(tmp_path / "trained.safetensors")
    assert loaded.config.clip.task_templates == {"neon": "a neon sign of a {}"}
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        tokens = METHODS[name].tokenize(config, towers.tokenizer, words)
        original = Classifier(towers, [(words, tokens, method())])
    reloaded = loaded.classifier()
    for task in words:
        assert torch.equal(reloaded.probabilities(task, pixels), original.probabilities(task, pixels))


def saved(tmp_path, clip, task: str, config: Config) -> TrainedAdapter:
    towers, fingerprint = clip
    words = {task: ["one", "two"]}
    state = build_method("coop", towers, words, config).state_dict()
    prompts = TrainedAdapter("coop", config, fingerprint, (words,), (state,))
    save_adapter(tmp_path / f"{task}.safetensors", prompts)
    return load_adapter(tmp_path / f"{task}.safetensors")


def test_merged_adapters_have_all_templates(clip, tmp_path):
    other_config = config_with(neon="a neon {}", ink="not {} ink")
    parts = [saved(tmp_path, clip, "ink", SMALL), saved(tmp_path, clip, "neon", other_config)]
    assert merge_adapters(parts).config.clip.task_templates == {"neon": "a neon {}"}


def test_adapters_without_task_templates_omit_them(clip, tmp_path):
    saved(tmp_path, clip, "ink", SMALL)
    with safe_open(tmp_path / "ink.safetensors", "pt") as file:
        assert "task_templates" not in json.loads(file.metadata()["adapter"])["config"]["clip"]


def test_an_added_task_may_have_its_own_template(clip, tmp_path):
    prompts = saved(tmp_path, clip, "ink", config_with(ink="an inked {}"))
    _check_compatible(config_with(ink="an inked {}", neon="a neon {}"), prompts)
    for config in (SMALL, config_with(ink="another {}")):
        with pytest.raises(UserError, match="clip.task_templates: ink has"):
            _check_compatible(config, prompts)


@pytest.mark.parametrize("template", ["a sketch", "{} and {}", "", 3])
def test_templates_without_a_placeholder_are_rejected(template):
    with pytest.raises(UserError, match="clip.task_templates.sketch"):
        parse_config({"clip": {"task_templates": {"sketch": template}}})


def test_a_long_text_is_reported_with_its_template():
    with pytest.raises(UserError, match="class 'cat' in the template 'so {} so .* tokens"):
        class_tokens(describe_tokenizer(tokenizer()), [TEMPLATES[0], "so {}" + " so" * 90], [["cat"], ["cat"]])
