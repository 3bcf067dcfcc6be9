"""Tests of all methods: trained parameters, features, saving."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import astuple, replace
from fnmatch import fnmatchcase
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_method import SKETCHED, equals, full_ids
from reference_towers import reference_encode_text
from small_clip import CLASS_NAMES, PREPROCESSING, small_towers, tokenizer
from small_methods import (
    FITTED,
    LEARNING,
    REFERENCES,
    SMALL,
    TRAINED,
    WORDS,
    build_method,
    config_of_references,
    fit,
    method_sets,
    method_tokens,
    task_sets,
)
from small_problem import CONFIG, TASKS, TEST_COUNTS, small_problem, write_test_splits

from pipeline.clip.load import build_meta_towers, load_clip, weights_fingerprint
from pipeline.config import (
    CONFIGS,
    AugmentationConfig,
    ClipConfig,
    Config,
    MmapConfig,
    load_yaml,
    parse_config,
)
from pipeline.data.augment import augment
from pipeline.data.parquet import SplitReader
from pipeline.errors import UserError
from pipeline.methods.adapter_file import TrainedAdapter, load_adapter, save_adapter
from pipeline.methods.classifier import Classifier
from pipeline.methods.hipro import task_tree
from pipeline.methods.method import TrainingOverrides
from pipeline.methods.registry import DEFAULT_VARIANTS, METHODS, VARIANTS, get_method, training_config
from pipeline.seeds import derive_seed
from pipeline.stages.group_trainings import random_groups
from pipeline.stages.training_spec import TrainingSpec
from pipeline.training.batches import batch_indices
from pipeline.training.evaluate import evaluate, evaluate_features
from pipeline.training.frozen_features import StoredFeatures, frozen_split_features, save_features
from pipeline.training.trainer import Trainer

SLOW = CONFIG.model_copy(update={"learning_rate": 1e-3})
STILL = {"augmentation": AugmentationConfig(crop_scale=(1, 1), flip=False)}
"""Changes of a config that make images equal in all steps."""
TOLERANCE = dict(rtol=1e-9, atol=1e-9)
INK = {"ink": CLASS_NAMES}
SHARED_NAMES = {"ink": CLASS_NAMES, "neon": CLASS_NAMES[:3][::-1], "chalk": [*CLASS_NAMES[1:], "dog"]}
SEVERAL_NAMES = [" | ".join(CLASS_NAMES[:2]), CLASS_NAMES[2], " | ".join(CLASS_NAMES[3:])]


def test_every_method_has_a_reference_and_variants():
    assert REFERENCES.keys() == METHODS.keys()
    assert {variant.method for variant in VARIANTS.values()} == METHODS.keys()
    assert tuple(VARIANTS)[-3:] == DEFAULT_VARIANTS == ("each_alone", "all_in_one", "grouped")
    with pytest.raises(UserError, match="unknown method 'lora'; methods: zero_shot, coop, vpt"):
        get_method("lora")


def test_all_optional_variants_are_valid_baselines():
    names = [name for name in VARIANTS if name not in ("zero_shot", *DEFAULT_VARIANTS)]
    assert parse_config({"baselines": names}).baselines == tuple(names)
    for name, hint in (
        ("cooop", "; did you mean coop?"),
        ("zero_shot", "."),
        ("grouped", "; did you mean lora_grouped?"),
    ):
        message = f"baselines='{name}': not a baseline{hint} Valid: coop, vpt, "
        with pytest.raises(UserError, match=re.escape(message)):
            parse_config({"baselines": [name]})


@pytest.mark.parametrize("several_names", [False, True], ids=["a name each", "several names"])
@pytest.mark.parametrize(
    "name, stage",
    [
        (name, stage)
        for name, reference in REFERENCES.items()
        if METHODS[name].has_parameters()
        for stage in range(reference.num_stages)
    ],
)
def test_a_method_equals_its_reference(name, stage, several_names):
    towers, model = small_towers()
    words = SEVERAL_NAMES if several_names else CLASS_NAMES
    method = build_method(name, towers, {"ink": words})
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if stage:
        method.start_stage(stage, [torch.randn(len(words), 12, dtype=torch.float64)])
    adaptation = method()
    x = adaptation.encode_image(towers, images, [3])
    tokens = method_tokens(name, towers, [words])
    (z,) = tokens.pool_names_to_classes(adaptation.encode_text(towers, tokens))
    plain = REFERENCES[name].features(method, model, images, SMALL)
    if several_names:
        rows = F.normalize(plain[1], dim=1)
        if len(rows) != len(words):  # a linear probe has a vector for each class
            rows = torch.stack([rows[:2].mean(0), rows[2], rows[3:].mean(0)])
        plain = plain[0], rows
    for ours, reference in zip((x, z), plain):
        torch.testing.assert_close(ours, reference, **TOLERANCE)
    label = torch.tensor([0, 2, 1])
    scale = dict(method.named_parameters()).get("towers.logit_scale", model.logit_scale)
    logits = adaptation.logits(towers, x, z), reference_logits(name, method, *plain, scale, SMALL)
    torch.testing.assert_close(*logits, **TOLERANCE)
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    if METHODS[name].merges or not parameters:
        return
    ours, reference = (
        torch.autograd.grad(F.cross_entropy(scores, label), parameters, allow_unused=REFERENCES[name].num_stages > 1)
        for scores in logits
    )
    for gradient, expected in zip(ours, reference):
        torch.testing.assert_close(gradient, expected, **TOLERANCE)


def reference_logits(name, method, x, z, scale, config):
    logits = scale.exp() * F.cosine_similarity(x[:, None], z, dim=-1)
    if REFERENCES[name].logits is None:
        return logits
    return REFERENCES[name].logits(method, F.normalize(x, dim=1), F.normalize(z, dim=1), logits, config)


@pytest.mark.parametrize("words", [{"ink": CLASS_NAMES}, SHARED_NAMES], ids=["a task", "tasks with shared names"])
@pytest.mark.parametrize("name", FITTED)
def test_a_method_is_fitted_as_its_reference(name, words):
    check_fit(name, words, SMALL)


@pytest.mark.parametrize("images", [4, 6, 7])
def test_gda_cross_validates_as_its_reference(images):
    """With up to five folds, which hold out one or two images of a class."""
    for words in (INK, SHARED_NAMES):
        check_fit("gda", words, SMALL, images)


def check_fit(name, words, config, images_per_class=3):
    towers, model = small_towers()
    method = METHODS[name].build(config, towers, words).double()
    training = fit(method, towers, words, images_per_class)
    state = REFERENCES[name].fit(getattr(config, name), training, 1 / model.logit_scale.exp().item())
    torch.testing.assert_close(method.state_dict(), dict(state), **TOLERANCE)


@pytest.mark.parametrize("name", TRAINED)
def test_all_parameters_of_a_method_train_and_no_others(name):
    towers, _ = small_towers()
    method = build_method(name, towers)
    frozen = {key: value.clone() for key, value in towers.state_dict().items()}
    untrained = {key: value.clone() for key, value in method.state_dict().items()}
    tokens = method_tokens(name, towers, [CLASS_NAMES, CLASS_NAMES])
    config = (SLOW if REFERENCES[name].needs_small_learning_rate else CONFIG).model_copy(update=STILL)
    all_images = config.model_copy(update={"batch_size": 15})
    measured = Trainer(towers, method, method_sets(name, towers, all_images), tokens, all_images, epochs=1, seed=5)
    untrained_loss = measured.backward(0)[0].sum()
    Trainer(towers, method, method_sets(name, towers, config), tokens, config, epochs=3, seed=5).train()
    assert all(torch.equal(value, frozen[key]) for key, value in towers.state_dict().items())
    gradients = [p.grad for p in method.parameters() if p.grad is not None or REFERENCES[name].num_stages == 1]
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)
    assert not any(
        torch.equal(value, untrained[key]) for key, value in method.state_dict().items() if value.is_floating_point()
    )
    assert measured.backward(0)[0].sum() < untrained_loss


@pytest.mark.parametrize(
    "name, stage", [(name, stage) for name in METHODS for stage in range(REFERENCES[name].num_stages)]
)
def test_saved_and_loaded_a_method_predicts_the_same(name, stage, tmp_path):
    towers = load_clip(SMALL.clip)
    words = {"ink": ["one", "two"], "neon": ["one", "two", "three"]}
    method = build_method(name, towers, words)
    if stage:
        method.start_stage(stage, [torch.randn(len(names), towers.embed_dim) for names in words.values()])
    trained = TrainedAdapter(name, SMALL, weights_fingerprint(towers), (words,), (method.state_dict(),))
    save_adapter(tmp_path / "trained.safetensors", trained)
    loaded = load_adapter(tmp_path / "trained.safetensors")
    assert loaded.num_parameters == sum(p.numel() for p in method.parameters())
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        original = Classifier(towers, [(words, METHODS[name].tokenize(SMALL, towers.tokenizer, words), method())])
    reloaded = loaded.classifier()
    for task in words:
        assert torch.equal(reloaded.probabilities(task, pixels), original.probabilities(task, pixels))


@pytest.mark.parametrize("name", TRAINED)
def test_initial_parameters_depend_only_on_the_seed(name):
    towers, _ = small_towers()
    torch.manual_seed(1)
    state = METHODS[name].build(SMALL, towers, INK).state_dict()
    torch.manual_seed(2)
    same_seed = METHODS[name].build(SMALL, towers, INK).state_dict()
    other_seed = METHODS[name].build(SMALL.model_copy(update={"seed": 2}), towers, INK).state_dict()
    assert all(torch.equal(value, same_seed[key]) for key, value in state.items())
    for key, value in towers.state_dict().items():  # trained weights start as CLIP's
        assert f"towers.{key}" not in state or torch.equal(value, state[f"towers.{key}"])
    assert all(torch.equal(value, other_seed[key]) for key, value in state.items()) != REFERENCES[name].random_start


START_CONFIG = config_of_references("start_options", clip={"template": SKETCHED})


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_is_initialized_as_in_the_reference(name):
    towers, model = small_towers()
    expected = REFERENCES[name].starts(towers, model)
    for parameter, start in METHODS[name].build(START_CONFIG, towers, WORDS).named_parameters():
        (check,) = (check for pattern, check in expected.items() if fnmatchcase(parameter, pattern))
        assert check(start.detach()), parameter


def test_a_linear_probe_is_initialized_with_the_mean_of_a_classs_names():
    towers, model = small_towers()
    start = METHODS["linear_probe"].build(SMALL, towers, {"ink": SEVERAL_NAMES}).weights
    names = F.normalize(model.encode_text(full_ids(SMALL.clip.template)), dim=1)
    torch.testing.assert_close(start.detach(), torch.stack([names[:2].mean(0), names[2], names[3:].mean(0)]))


@pytest.mark.parametrize(
    "length, words, text",
    [
        (1, "an", "old sketch of the {}, in ink."),
        (2, "an old", "sketch of the {}, in ink."),
        (5, "an old sketch of the", "{}, in ink."),
        (6, None, "{}, in ink."),
    ],
)
@pytest.mark.parametrize("name", ["maple", "promptsrc"])
def test_prompts_start_as_the_tokens_that_they_replace(name, length, words, text):
    towers, model = small_towers()
    options = {**getattr(SMALL, name).model_dump(), "prompt_length": length}
    config = parse_config({"clip": {"template": SKETCHED}, name: options})
    method = METHODS[name].build(config, towers, INK)
    start = method.double().text_prompts.detach()
    if words:
        assert equals(model.token_embedding(torch.tensor(tokenizer().encode(words))))(start[0])
    assert 0.01 < start[1 if words else 0 :].std() < 0.03
    z = method().encode_text(towers, METHODS[name].tokenize(config, towers.tokenizer, INK))
    torch.testing.assert_close(z, reference_encode_text(model, full_ids(text), start, propagate=True), **TOLERANCE)


def test_promptsrc_ends_with_a_gaussian_average_of_its_epochs():
    towers, _ = small_towers()
    sets = method_sets("promptsrc", towers)
    tokens = method_tokens("promptsrc", towers, list(WORDS.values()))
    prompts, states = [], []
    trainer = Trainer(towers, build_method("promptsrc", towers), sets, tokens, SLOW, epochs=4, seed=5)
    last = trainer.method.epoch_weights(50)
    gauss = [math.exp(-(((epoch - 30) / 30) ** 2) / 2) for epoch in range(1, 51)]
    assert last == pytest.approx([weight / sum(gauss) for weight in gauss], rel=1e-12)
    for _ in range(3):
        trainer.run_epoch()
        prompts.append(copy.deepcopy(trainer.method.state_dict()))
        states.append(copy.deepcopy(trainer.state_dict()))
    trainer.train()
    unaveraged = build_method("promptsrc", towers)
    unaveraged.epoch_weights = lambda epochs: None
    Trainer(towers, unaveraged, sets, tokens, SLOW, epochs=4, seed=5).train()
    prompts.append(unaveraged.state_dict())
    weights = trainer.method.epoch_weights(4)
    expected = {name: sum(w * p[name] for w, p in zip(weights, prompts)) for name in prompts[0]}
    torch.testing.assert_close(trainer.method.state_dict(), expected, **TOLERANCE)
    assert not torch.allclose(expected["text_prompts"], prompts[-1]["text_prompts"], rtol=1e-6)
    for state in states:
        resumed = Trainer(towers, build_method("promptsrc", towers), sets, tokens, SLOW, epochs=4, seed=5)
        resumed.load_state_dict(state)
        resumed.train()
        assert all(torch.equal(p, expected) for p, expected in zip(resumed.parameters, trainer.parameters))


def test_two_stage_trains_layernorms_then_a_classifier_with_a_schedule_each():
    """Compare with two trainings in a row as in the authors' code, each with its own AdamW and cosine."""
    towers, _ = small_towers()
    (task_set,), tokens = method_sets("two_stage", towers), method_tokens("two_stage", towers, list(WORDS.values()))
    config = training_config("two_stage", Config()).model_copy(update={"batch_size": 3, "learning_rate": 1e-3})
    trainer = Trainer(towers, build_method("two_stage", towers), [task_set], tokens, config, epochs=2, seed=5)
    states = [copy.deepcopy(trainer.state_dict())]
    for _ in range(2):
        trainer.run_epoch()
        states.append(copy.deepcopy(trainer.state_dict()))

    slow = build_method("two_stage", towers)
    norms, step = list(slow.towers.parameters()), 0
    for parameters, num_steps in ((norms, 6), ([slow.weights], 4)):  # of 10
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.01)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, eta_min=1e-6)
        if parameters is not norms:
            z = slow.towers.encode_text(tokens).detach()
            assert len(slow.weights) == 5  # of both tasks, with the same names
            slow.weights.data.copy_(z[:5] / z[:5].norm(dim=1, keepdim=True))
        for _ in range(num_steps):
            pixels, labels = task_set.batch(step, 3, PREPROCESSING, config.augmentation, 5)
            counts = list(map(len, labels))
            x = slow.towers.encode_image(towers.normalize_pixels(pixels), None, counts)
            if parameters is norms:
                zs = [slow.towers.encode_text(tokens)[:5]] * 2
            else:
                x, zs = x.detach(), [slow.weights] * 2
            logits = torch.cat([towers.logits(*pair) for pair in zip(x.split(counts), zs)])
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.cat(labels)).backward()
            assert trainer.history[step].learning_rate == pytest.approx(cosine.get_last_lr()[0], rel=1e-9)
            optimizer.step()
            cosine.step()
            step += 1
    slow.stage.fill_(1)
    torch.testing.assert_close(trainer.method.state_dict(), slow.state_dict(), **TOLERANCE)
    for state in states[:2]:
        resumed = Trainer(towers, build_method("two_stage", towers), [task_set], tokens, config, epochs=2, seed=5)
        resumed.load_state_dict(state)
        resumed.train()
        torch.testing.assert_close(resumed.method.state_dict(), trainer.method.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("fraction, stage", [(0, 1), (1, 0)])
def test_a_stage_may_have_no_steps(fraction, stage):
    towers, _ = small_towers()
    config = SMALL.model_copy(update={"two_stage": METHODS["two_stage"].Options(first_stage_fraction=fraction)})
    method = build_method("two_stage", towers, config=config)
    untrained = copy.deepcopy(method.state_dict())
    tokens = method_tokens("two_stage", towers, list(WORDS.values()))
    Trainer(towers, method, method_sets("two_stage", towers), tokens, SLOW, epochs=1, seed=5).train()
    changed = {key for key, value in method.state_dict().items() if not torch.equal(value, untrained[key])}
    assert method.stage == stage
    assert changed == ({"weights", "stage"} if stage else untrained.keys() - {"weights", "stage"})


def test_maples_deeper_projections_start_equal():
    towers, _ = small_towers()
    first, second, *others = METHODS["maple"].build(parse_config({"maple": {"depth": 4}}), towers, INK).projections
    assert len(others) == 2 and not torch.equal(first.weight, second.weight)
    for other in others:
        assert torch.equal(other.weight, second.weight) and torch.equal(other.bias, second.bias)
        assert other.weight.data_ptr() != second.weight.data_ptr()


@pytest.mark.parametrize(
    "name, options, expected",
    [(name, *count) for name, reference in REFERENCES.items() for count in reference.num_parameters],
)
def test_parameter_counts_of_vit_b_16(name, options, expected):
    """Counts for one group of tasks."""
    towers = build_meta_towers(ClipConfig())
    towers.token_embedding.to_empty(device="cpu")
    towers.encode_text = lambda tokens: torch.zeros(len(tokens.suffix), 512)  # the towers have no weights
    method = METHODS[name].build(parse_config({METHODS[name].section: options}), towers, WORDS)
    assert sum(p.numel() for p in method.parameters()) == expected


def test_tip_adapter_f_has_a_feature_per_image_of_imagenet():
    """16 shots of 1,000 classes on ResNet-50: the paper's 16.3 M parameters."""
    towers = build_meta_towers(ClipConfig(model="RN50"))
    words = {"imagenet": [str(number) for number in range(1000)]}
    labels = torch.arange(1000).repeat(16)
    for name, count in (("tip_adapter_f", 16_384_000), ("tip_adapter", 0)):
        method = METHODS[name].build(Config(), towers, words).to_empty(device="cpu")
        method.fit([torch.zeros(16_000, 1, 1024)], [labels], [])
        assert sum(p.numel() for p in method.parameters() if p.requires_grad) == count
        assert len(method.keys) == 16_000


def test_a_method_trains_with_its_authors_or_the_papers_settings():
    config = parse_config({"training": {"epochs": 7, "momentum": 0.8}, "coop": {"training": {"epochs": 3}}})
    coop_training = training_config("coop", config)
    assert (coop_training.epochs, coop_training.batch_size, coop_training.learning_rate, coop_training.momentum) == (
        3,
        32,
        0.002,
        0.8,
    )
    assert training_config("mmap", config) == training_config("joint_prompts", config) == config.training
    lora = training_config("clip_lora", config)
    assert (lora.optimizer, lora.learning_rate, lora.weight_decay) == ("adamw", 2e-4, 0.01)
    assert (lora.warmup_epochs, lora.min_learning_rate, lora.schedule_interval) == (0, 1e-6, "step")
    alike = parse_config(load_yaml(CONFIGS / "paper_protocol.yaml"))
    for name in TRAINED:
        differs = training_config(name, alike) != alike.training
        assert differs == (name == "full_finetune"), name  # which is no parameter-efficient method
    assert alike.clip.template == "a photo of a {}"


def test_adamw_equals_torchs():
    towers, _, tokens, sets = small_problem()
    ours, plain = build_method("vpt", towers), build_method("vpt", towers)
    config = SLOW.model_copy(update={"optimizer": "adamw", "weight_decay": 0.1})
    history = Trainer(towers, ours, sets, tokens, config, epochs=2, seed=5).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.999), weight_decay=0.1)
    for step, record in enumerate(history):
        optimizer.param_groups[0]["lr"] = record.learning_rate
        adaptation = plain()
        batches = [task_set.batch(step, 3, PREPROCESSING, CONFIG.augmentation, 5) for task_set in sets]
        images = towers.normalize_pixels(torch.cat([pixels for pixels, _ in batches]))
        x = adaptation.encode_image(towers, images, [3, 3]).split(3)
        z = adaptation.encode_text(towers, tokens).split(5)
        losses = [F.cross_entropy(towers.logits(*pair), labels) for *pair, (_, (labels,)) in zip(x, z, batches)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), **TOLERANCE)


def test_a_maple_deeper_than_the_towers_is_refused():
    towers, _ = small_towers()
    with pytest.raises(UserError, match="maple.depth=9: the shallower tower has 2 layers"):
        METHODS["maple"].check(Config(), towers)


def test_random_groups_have_the_given_sizes_and_depend_only_on_the_seed():
    tasks = [f"task {number}" for number in range(9)]
    drawn = [random_groups(tasks, [4, 3, 2], seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for groups in drawn:
        assert [len(group) for group in groups] == [4, 3, 2]
        assert sorted(task for group in groups for task in group) == tasks


# Shared frozen features


class Uncached(torch.nn.Module):
    """A method whose towers look modified, so that every step runs both."""

    def __init__(self, method, towers):
        super().__init__()
        self.method, self.frozen = method, (towers,)

    def forward(self):
        return replace(self.method(), towers=self.frozen[0])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_what_it_modifies(name):
    towers, _ = small_towers()
    adaptation = build_method(name, towers)()
    assert adaptation.modifies_image_encoder == METHODS[name].modifies_image_encoder
    assert (adaptation.consistency is not None) == METHODS[name].uses_consistency
    assert adaptation.modifies_text_encoder == REFERENCES[name].modifies_text_encoder
    assert (adaptation.towers is not None) == (REFERENCES[name].trains_weight is not None)


@pytest.mark.parametrize(
    "name",
    [name for name in TRAINED if not (METHODS[name].modifies_image_encoder and REFERENCES[name].modifies_text_encoder)],
)
def test_frozen_features_do_not_change_the_training(name):
    towers, _ = small_towers()
    tokens = method_tokens(name, towers, list(WORDS.values()))
    sets = method_sets(name, towers)
    cached, uncached = build_method(name, towers), build_method(name, towers)
    cached_sets, uncached_sets = (
        (replace(s, images=() if not METHODS[name].modifies_image_encoder else s.images) for s in sets),
        sets,
    )
    if uncached().text_features:  # which do not come from the towers
        reference = Uncached(uncached, None)
        reference.forward = lambda: replace(uncached(), vision_prompts=torch.zeros(2, 1, 0, 24, dtype=torch.float64))
    else:
        reference = Uncached(uncached, towers)
    trainer = Trainer(towers, cached, list(cached_sets), tokens, SLOW, epochs=2, seed=5)
    uncached.load_state_dict(cached.state_dict())  # which may have been fitted
    ours = trainer.train()
    expected = Trainer(towers, reference, list(uncached_sets), tokens, SLOW, epochs=2, seed=5).train()
    assert [r.accuracies for r in ours] == [r.accuracies for r in expected]
    torch.testing.assert_close([r.losses for r in ours], [r.losses for r in expected], **TOLERANCE)
    torch.testing.assert_close(cached.state_dict(), uncached.state_dict(), **TOLERANCE)


@pytest.mark.parametrize("name", ["zero_shot", "clip_adapter", "lamm", *FITTED])
def test_predictions_from_stored_features_are_those_from_images(name, tmp_path):
    write_test_splits(tmp_path)
    towers, _ = small_towers()
    reader, words = SplitReader(tmp_path / "splits"), dict.fromkeys(TEST_COUNTS, CLASS_NAMES)
    stored = {}
    for task in words:
        save_features(tmp_path / task, frozen_split_features(towers, reader, task, 2, "auto"))
        stored[task] = StoredFeatures(tmp_path / task)
        assert len(stored[task]) == TEST_COUNTS[task]
    with torch.no_grad():
        method = build_method(name, towers, words)
        tokens = METHODS[name].tokenize(SMALL, towers.tokenizer, words)
        classifier = Classifier(towers, [(words, tokens, method())])
    predictions_from_images = evaluate(classifier, reader, tuple(words), threads=2)
    predictions_from_features = evaluate_features(classifier, reader, stored)
    for ours, expected in zip(predictions_from_features, predictions_from_images, strict=True):
        assert astuple(ours)[:4] == astuple(expected)[:4]
        assert ours.probability == pytest.approx(expected.probability, rel=1e-9)
        assert ours.loss == pytest.approx(expected.loss, rel=1e-9)


def test_views_of_a_training_set_are_its_first_epochs():
    """Without augmentation, all views of an image have its feature; with it, they are those of the batches, of which
    the last goes on with the next epoch."""
    towers, _ = small_towers()
    configs = [CONFIG.model_copy(update={"batch_size": 4, **changes}) for changes in (STILL, {})]
    (still_set,), (augmented_set,) = (method_sets("gda", towers, config) for config in configs)
    for views, task_set in zip(still_set.frozen_views(4, 4, 5), task_sets(configs[0]), strict=True):
        pixels = augment(task_set.images, PREPROCESSING, configs[0].augmentation, torch.Generator())
        x = towers.encode_image(towers.normalize_pixels(pixels))
        torch.testing.assert_close(views, x[:, None].expand(-1, 4, -1), **TOLERANCE)
    expected = [[] for _ in range(15)]
    for step in range(8):
        indices = batch_indices(15, 4, step, derive_seed(5, "order", *TASKS))
        for index, x in zip(sorted(indices, key=lambda index: index >= 10), augmented_set.frozen_features[step]):
            expected[index].append(x)
    assert sorted(map(len, expected)) == [2] * 13 + [3] * 2
    views = augmented_set.frozen_views(2, 4, 5)
    assert list(map(len, views)) == [10, 5]
    assert torch.equal(torch.cat(views), torch.stack([torch.stack(image_views[:2]) for image_views in expected]))


@pytest.mark.parametrize("name", FITTED)
def test_a_trainer_fits_a_method_before_its_steps(name):
    towers, _ = small_towers()
    tokens, sets = method_tokens(name, towers, list(WORDS.values())), method_sets(name, towers)
    method, expected = (METHODS[name].build(SMALL, towers, WORDS).double() for _ in range(2))
    z = tokens.pool_names_to_classes(towers.encode_text(tokens))
    expected.fit(sets[0].frozen_views(method.views, 3, 5), sets[0].labels, z)
    trainer = Trainer(towers, method, [replace(sets[0], images=())], tokens, CONFIG, epochs=0, seed=5)
    torch.testing.assert_close(method.state_dict(), expected.state_dict(), **TOLERANCE)
    assert trainer.train() == [] and trainer.num_steps == 0


def test_a_cache_whose_keys_and_values_differ_in_number_is_refused():
    towers = load_clip(SMALL.clip)
    state = dict(build_method("tip_adapter", towers, INK).state_dict())
    for damaged in (state["keys"][1:], torch.tensor(1.0)):
        trained = TrainedAdapter(
            "tip_adapter", SMALL, weights_fingerprint(towers), (dict(INK),), ({**state, "keys": damaged},)
        )
        with pytest.raises(UserError, match="does not fit Tip-Adapter"):
            trained.classifier(towers=towers)


@pytest.mark.parametrize("images, alpha", [(8, 1.0), (2, 0.001)], ids=["cross-validated", "one shot"])
def test_gda_selects_its_weight_on_training_images(images, alpha):
    """Each image is like the other class's text, so that the Gaussians must outweigh it; one image per class leaves
    none to hold out."""
    towers, _ = small_towers()
    z = torch.eye(12, dtype=torch.float64)[:2]
    noise = torch.randn(8, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, labels = z.flip(0).repeat(4, 1)[:, None] + 0.1 * noise, torch.tensor([0, 1] * 4)
    weights = []
    for option in (None, alpha):
        config = SMALL.model_copy(update={"gda": SMALL.gda.model_copy(update={"alpha": option})})
        method = METHODS["gda"].build(config, towers, {"ink": CLASS_NAMES[:2]}).double()
        method.fit([x[:images]], [labels[:images]], [z])
        weights.append(method.weights)
    torch.testing.assert_close(*weights, **TOLERANCE)


def first_losses(name, config, towers, model):
    """Return each task's loss in the first step, of the trainer and of the reference."""
    sets = method_sets(name, towers)
    frozen_tokens = method_tokens("zero_shot", towers, list(WORDS.values()))
    frozen_z = F.normalize(model.encode_text(full_ids(config.clip.template)), dim=1)
    method = build_method(name, towers, config=config)
    tokens = method_tokens(name, towers, list(WORDS.values()), config)
    untrained, options = copy.deepcopy(method), getattr(config, METHODS[name].section)
    record = Trainer(towers, method, sets, tokens, SLOW, epochs=1, seed=5, frozen_tokens=frozen_tokens).step()
    plain = []
    (mixed_set,) = sets
    pixels, labels_by_task = mixed_set.batch(0, 3, PREPROCESSING, CONFIG.augmentation, 5)
    batches = towers.normalize_pixels(pixels).split([len(labels) for labels in labels_by_task])
    for images, labels in zip(batches, labels_by_task):
        x, z = (F.normalize(f, dim=1) for f in REFERENCES[name].features(untrained, model, images, config))
        frozen_x = F.normalize(model.encode_image(images), dim=1)
        p, q = ((model.logit_scale.exp() * a @ b.T) for a, b in ((x, z), (frozen_x, frozen_z)))
        added = REFERENCES[name].added_loss(untrained, options, x, frozen_x, z, frozen_z, p, q)
        plain.append((F.cross_entropy(p, labels) + added).item())
    return record.losses, plain


@pytest.mark.parametrize("name", [name for name in TRAINED if METHODS[name].uses_consistency])
def test_consistency_losses_equal_the_references(name):
    losses, plain = first_losses(name, SMALL, *small_towers())
    assert losses == pytest.approx(plain, rel=1e-9)


def test_methods_of_groups_do_not_mix_tasks():
    assert {name for name, method in METHODS.items() if not method.mixes_tasks} == {"mmap_shared", "mmap", "group_lora"}
    assert (METHODS["coop"].tasks_per_set(TASKS), METHODS["mmap"].tasks_per_set(TASKS)) == (
        [TASKS],
        [("ink",), ("chalk",)],
    )


@pytest.mark.parametrize("name", [name for name in TRAINED if METHODS[name].mixes_tasks])
def test_a_mixed_batch_has_one_mean_loss(name):
    """Compare with a slow reference as in Dassl: a shuffled list of all tasks' images, of which each runs alone and is
    compared with its own task's classes, and the mean cross-entropy of a batch."""
    towers, model = small_towers()
    config = SLOW.model_copy(update=STILL)
    sets, words = task_sets(config), {"ink": CLASS_NAMES, "chalk": CLASS_NAMES[::-1]}
    fast, slow = build_method(name, towers, words), build_method(name, towers, words)
    tokens, frozen_tokens = (method_tokens(kind, towers, list(words.values())) for kind in (name, "zero_shot"))
    options = {"epochs": 2, "seed": 5, "frozen_tokens": frozen_tokens}
    trainer = Trainer(towers, fast, method_sets(name, towers, config), tokens, config, **options)
    slow.load_state_dict(fast.state_dict())  # which may have been fitted
    assert trainer.num_steps == 10  # 15 images
    history = [trainer.step() for _ in range(9)]  # the last may average
    assert any(None in record.losses for record in history)

    images = [(task, *pair) for task, task_set in enumerate(sets) for pair in zip(task_set.images, task_set.labels[0])]
    frozen_zs = tokens.pool_names_to_classes(F.normalize(towers.encode_text(frozen_tokens), dim=1))
    optimizer = torch.optim.SGD(slow.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    for step, record in enumerate(history):
        optimizer.param_groups[0]["lr"] = record.learning_rate
        if REFERENCES[name].num_stages > 1 and step == slow.stage_steps(10)[0]:
            slow.start_stage(1, tokens.pool_names_to_classes(slow().encode_text(towers, tokens).detach()))
        adaptation = slow()
        zs = tokens.pool_names_to_classes(adaptation.encode_text(towers, tokens))
        logits, labels, tasks, added = [], [], [], []
        for task, image, label in (images[i] for i in batch_indices(15, 3, step, derive_seed(5, "order", *TASKS))):
            pixels = towers.normalize_pixels(augment([image], PREPROCESSING, config.augmentation, torch.Generator()))
            x = adaptation.encode_image(towers, pixels, [int(task == 0), int(task == 1)])
            logits.append(adaptation.logits(towers, x, zs[task], task))
            labels.append(label)
            tasks.append(task)
            if METHODS[name].uses_consistency:
                frozen_x = F.normalize(model.encode_image(pixels), dim=1)
                unit = F.normalize(x, dim=1), frozen_x, F.normalize(zs[task], dim=1), frozen_zs[task]
                scores = logits[-1], towers.logits(frozen_x, frozen_zs[task])
                section = getattr(SMALL, METHODS[name].section)
                added.append(REFERENCES[name].added_loss(slow, section, *unit, *scores))
        logits, labels, tasks = torch.cat(logits), torch.stack(labels), torch.tensor(tasks)
        loss = F.cross_entropy(logits, labels) + (torch.stack(added).mean() if added else 0)
        optimizer.zero_grad()
        loss.backward()
        for task, (task_loss, accuracy) in enumerate(zip(record.losses, record.accuracies)):
            if task in tasks:
                own = tasks == task
                expected = F.cross_entropy(logits[own], labels[own]) + (torch.stack(added)[own].mean() if added else 0)
                assert task_loss == pytest.approx(expected.item(), rel=1e-9)
                assert accuracy == pytest.approx((logits[own].argmax(1) == labels[own]).double().mean().item())
            else:
                assert task_loss is accuracy is None
        optimizer.step()
    for ours, expected in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, **TOLERANCE)
        torch.testing.assert_close(ours, expected, **TOLERANCE)


# Options


OPTIONS_CONFIG = SMALL.model_copy(update={"mmap": MmapConfig(prompt_length=6, source_rows=2)})
METHOD_OPTIONS = [(name, option) for name, reference in REFERENCES.items() for option in reference.options]


def config_with_option(name, option):
    section = METHODS[name].section
    changed = {**getattr(OPTIONS_CONFIG, section).model_dump(), option: REFERENCES[name].options[option].value}
    return parse_config({**OPTIONS_CONFIG.model_dump(), section: changed})


@pytest.mark.parametrize("name", METHODS)
def test_a_reference_has_every_option(name):
    section = METHODS[name].section
    defaults = {} if section is None else {field: value for field, value in getattr(Config(), section)}
    options = REFERENCES[name].options
    assert options.keys() == defaults.keys() - {"training"}
    for option, (value, *_) in options.items():
        assert value not in (defaults[option], getattr(getattr(OPTIONS_CONFIG, section), option))
        assert value is True or value != 1


@cache
def check_against_reference(name, config):
    """Method, Adaptation, and all features and losses as one list."""
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    towers, model = small_towers(config.mmap.text_prompt_position, text_layers=4, vision_layers=5)
    method = build_method(name, towers, INK, config)
    adaptation = method()
    tokens = method_tokens(name, towers, [CLASS_NAMES], config)
    x = adaptation.encode_image(towers, images, [3])
    (z,) = tokens.pool_names_to_classes(adaptation.encode_text(towers, tokens))
    for features, plain in zip((x, z), REFERENCES[name].features(method, model, images, config)):
        torch.testing.assert_close(features, plain, **TOLERANCE)
    losses: tuple[float, ...] = ()
    if METHODS[name].uses_consistency:
        losses, plain_losses = first_losses(name, config, towers, model)
        assert losses == pytest.approx(plain_losses, rel=1e-9)
    logits = adaptation.logits(towers, x, z)
    scale = (adaptation.towers or towers).logit_scale
    torch.testing.assert_close(logits, reference_logits(name, method, x, z, scale, config), **TOLERANCE)
    if name in FITTED:
        check_fit(name, INK, config)
    return method, adaptation, [*x.flatten().tolist(), *z.flatten().tolist(), *logits.flatten().tolist(), *losses]


@pytest.mark.parametrize("name, option", METHOD_OPTIONS)
def test_a_changed_option_equals_the_reference(name, option):
    config = config_with_option(name, option)
    *_, default_outcome = check_against_reference(name, OPTIONS_CONFIG)
    method, adaptation, outcome = check_against_reference(name, config)
    assert (outcome == default_outcome) == REFERENCES[name].options[option].only_in_training
    parameters = {f".{key}": tuple(value.shape) for key, value in method.named_parameters()}
    for suffix, shape in REFERENCES[name].options[option].shapes.items():
        shapes = {actual for key, actual in parameters.items() if key.endswith(f".{suffix}")}
        assert shapes == {shape}, suffix
    propagate = adaptation.text_prompts if adaptation.text_prompts_propagate else getattr(method, "contexts", None)
    assert METHODS[name].num_prompt_positions(config) == (0 if propagate is None else propagate.shape[-2])


@pytest.mark.parametrize("name, option", METHOD_OPTIONS)
def test_a_file_keeps_a_changed_option(name, option, tmp_path):
    config = config_with_option(name, option)
    state = {"numbers": torch.zeros(10_000)}
    trained = TrainedAdapter(name, config, "weights", (dict(INK),), (state,))
    save_adapter(tmp_path / "trained.safetensors", trained)
    loaded = load_adapter(tmp_path / "trained.safetensors").config
    options = (getattr(c, METHODS[name].section).model_dump(exclude={"training"}) for c in (loaded, config))
    assert next(options) == next(options)


def test_a_loaded_model_keeps_its_text_prompt_position(tmp_path):
    for text_prompt_position in ("after_sos", "before_sos"):
        config = SMALL.model_copy(
            update={"mmap": MmapConfig(prompt_length=2, source_rows=2, text_prompt_position=text_prompt_position)}
        )
        towers = load_clip(config.clip, text_prompt_position)
        state = build_method("mmap", towers, INK, config).state_dict()
        trained = TrainedAdapter("mmap", config, weights_fingerprint(towers), (dict(INK),), (state,))
        save_adapter(tmp_path / "trained.safetensors", trained)
        loaded = load_adapter(tmp_path / "trained.safetensors").classifier()
        assert loaded.towers.prompts_before_sos == (text_prompt_position == "before_sos")


def test_a_trainings_towers_follow_the_config(monkeypatch):
    monkeypatch.setattr(TrainingSpec, "device", lambda work: torch.device("cpu"))  # which asks Ray
    for text_prompt_position, activation_memory_gib in (("after_sos", 6.0), ("before_sos", 0.5)):
        clip = {**SMALL.clip.model_dump(), "activation_memory_gib": activation_memory_gib}
        config = parse_config({"clip": clip, "mmap": {"text_prompt_position": text_prompt_position}})
        towers = TrainingSpec(config, None, TASKS, "training").towers()
        assert towers.prompts_before_sos == (text_prompt_position == "before_sos")
        assert towers.activation_memory_gib == activation_memory_gib


@pytest.mark.parametrize("name", [name for name in TRAINED if not name.startswith("mmap")])
def test_a_methods_training_overrides_the_common_one(name):
    overrides = {"epochs": 7, "batch_size": 6, "learning_rate": 0.5, "weight_decay": 0.25, "warmup_epochs": 3}
    default = training_config(name, Config())
    overrides["min_learning_rate"] = 0.125
    overrides["optimizer"] = "sgd" if default.optimizer == "adamw" else "adamw"
    overrides["schedule_interval"] = "step" if default.schedule_interval == "epoch" else "epoch"
    overrides["aggregation"] = "famo"
    assert overrides.keys() == TrainingOverrides.model_fields.keys()
    section = METHODS[name].section
    for field, value in overrides.items():
        changed = training_config(name, parse_config({section: {"training": {field: value}}}))
        assert changed == default.model_copy(update={field: value})
        common = parse_config({"training": {**overrides, "momentum": 0.3}, section: {"training": {field: None}}})
        assert getattr(training_config(name, common), field) == value and training_config(name, common).momentum == 0.3


# Multi-task methods


def test_a_task_tree_merges_tasks_of_highest_affinity_first():
    affinity = np.array([[9, 0.1, 0.8, 0.0], [0.1, 9, 0.2, 0.6], [0.8, 0.2, 9, 0.1], [0.0, 0.6, 0.1, 9]])
    nodes = task_tree(affinity)
    assert [np.flatnonzero(node).tolist() for node in nodes] == [[0], [1], [2], [3], [0, 2], [1, 3], [0, 1, 2, 3]]
    assert task_tree(np.ones((1, 1))).tolist() == [[True]]


def test_hipro_averages_the_nodes_over_each_tasks_path():
    towers, model = small_towers()
    words = {"ink": CLASS_NAMES, "neon": CLASS_NAMES[:3], "chalk": CLASS_NAMES[1:]}
    method = build_method("hipro", towers, words)
    method.build_tree(np.array([[1, 0.2, 0.7], [0.2, 1, 0.1], [0.7, 0.1, 1]]))
    tokens = method_tokens("hipro", towers, list(words.values()))
    z = method().encode_text(towers, tokens)
    node_features = [
        F.normalize(reference_encode_text(model, full_ids("{}."), context[None], propagate=True), dim=1)
        for context in method.contexts
    ]
    ink, neon, chalk, ink_and_chalk, root = node_features
    expected = [(ink + ink_and_chalk + root) / 3, ((neon + root) / 2)[:3], ((chalk + ink_and_chalk + root) / 3)[1:]]
    torch.testing.assert_close(z, torch.cat(expected), **TOLERANCE)
    part = method().encode_text(towers, tokens.slice_rows(3, 10))  # a worker's shard
    torch.testing.assert_close(part, torch.cat(expected)[3:10], **TOLERANCE)


def test_lora_of_a_group_gives_each_task_its_own_update():
    towers, model = small_towers()
    words = {"ink": CLASS_NAMES, "chalk": CLASS_NAMES[::-1]}
    method = build_method("group_lora", towers, words)
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, adaptation = method_tokens("group_lora", towers, list(words.values())), method()
    x, z = adaptation.encode_image(towers, images, [2, 3]).split([2, 3]), adaptation.encode_text(towers, tokens)
    expected = [REFERENCES["group_lora"].features(method, model, images, SMALL, index) for index in (0, 1)]
    for index, rows in enumerate((slice(0, 2), slice(2, 5))):
        torch.testing.assert_close(x[index], expected[index][0][rows], **TOLERANCE)
        plain = expected[index][1]
        torch.testing.assert_close(z[5 * index :][:5], plain.flip(0) if index else plain, **TOLERANCE)
    (z[5:].square().sum() + x[1].square().sum()).backward()
    for stack in method.task:
        assert not stack.up.grad[0].any() and stack.up.grad[1].any()
    assert all(update.up.grad.any() for update in method.group)
    part = adaptation.encode_text(towers, tokens.slice_rows(6, 9))  # a worker's shard, without the first task
    torch.testing.assert_close(part, z[6:9], **TOLERANCE)
    no_image = adaptation.encode_image(towers, images, [0, 5])
    torch.testing.assert_close(no_image, expected[1][0], **TOLERANCE)


def test_softcpt_gives_each_task_its_own_context():
    towers, model = small_towers()
    method = build_method("softcpt", towers, {"ink": CLASS_NAMES, "Real_World": CLASS_NAMES})
    contexts = method().text_prompts
    ids = tokenizer()(["Real World."])
    (task_feature,) = reference_encode_text(model, ids, method.meta_prompt[None], propagate=True)
    expected = torch.stack([task_feature @ method.projection[:, i] for i in range(3)])
    torch.testing.assert_close(contexts[1, 0], expected, **TOLERANCE)
    assert not torch.allclose(contexts[0], contexts[1])


@pytest.mark.parametrize("name", ["linear_probe", "two_stage", "lamm"])
def test_classes_with_equal_names_share_parameters(name):
    towers, _ = small_towers()
    words = {"ink": CLASS_NAMES, "neon": CLASS_NAMES[::-1], "chalk": ["dog", CLASS_NAMES[0]]}
    method = build_method(name, towers, words)
    tokens = method_tokens(name, towers, list(words.values()))
    if name == "two_stage":
        method.start_stage(1, tokens.pool_names_to_classes(towers.encode_text(tokens)))
    assert next(method.parameters()).shape == (len(CLASS_NAMES) + 1, *([1, 16] if name == "lamm" else [12]))
    z = method().encode_text(towers, tokens)
    torch.testing.assert_close(z[:5], z[5:10].flip(0), **TOLERANCE)
    torch.testing.assert_close(z[0], z[11], **TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_a_name_may_occur_in_different_classes_of_two_tasks(name):
    towers, _ = small_towers()
    words = {"ink": CLASS_NAMES, "neon": [f"{CLASS_NAMES[0].upper()} | tiger", "dog"]}
    method = build_method(name, towers, words)
    tokens = method_tokens(name, towers, list(words.values()))
    ink, neon = tokens.pool_names_to_classes(method().encode_text(towers, tokens))
    assert (len(ink), len(neon)) == (5, 2) and neon.isfinite().all()


# Merged methods


def merged_by_loops(name, vectors, config):
    """Merge vectors of numbers one number at a time, as the papers print it."""
    if name != "ties":
        factor = config.task_arithmetic.scaling if name == "task_arithmetic" else config.wise_ft.alpha
        return [factor * sum(values) for values in zip(*vectors)]
    num_kept = int(config.ties.density * len(vectors[0]))
    smallest = [sorted(map(abs, vector))[-num_kept] for vector in vectors]
    merged = []
    for values in zip(*vectors):
        trimmed = [value if abs(value) >= limit else 0.0 for value, limit in zip(values, smallest)]
        agreeing = [value for value in trimmed if value * sum(trimmed) > 0]
        merged.append(config.ties.scaling * sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "wise_ft"])
def test_a_merging_rule_equals_plain_loops(name):
    """Also where signs weigh the same, magnitudes are equal, or a task changes nothing."""
    config = parse_config({"ties": {"density": 0.4, "scaling": 0.7}})
    numbers = torch.randn(3, 30, dtype=torch.float64, generator=torch.manual_seed(3))
    numbers[:, :3] = torch.tensor([[3, 3, -3], [-3, 3, -5], [0, 0, 3]])
    if name == "wise_ft":
        numbers = numbers[:1]
    vectors = [{"a": row[:6].reshape(2, 3), "b": row[6:]} for row in numbers]
    merged = METHODS[name].combine(config, vectors)
    assert merged["a"].shape == (2, 3)
    expected = merged_by_loops(name, numbers.tolist(), config)
    torch.testing.assert_close(torch.cat([merged["a"].flatten(), merged["b"]]).tolist(), expected, **TOLERANCE)


# Methods with their own towers


OWN_TOWERS = {name: reference for name, reference in REFERENCES.items() if reference.trains_weight}


def test_trainable_towers_copy_and_save_only_what_trains():
    towers = load_clip(SMALL.clip)
    frozen_weights = dict(towers.named_parameters())
    for name, reference in OWN_TOWERS.items():
        method = METHODS[name].build(SMALL, towers, WORDS)
        trained = method.towers.state_dict(keep_vars=True)
        trained = {key: value for key, value in trained.items() if "in_proj_update" not in key}
        assert trained.keys() == {key for key in frozen_weights if reference.trains_weight(key)}
        assert all(
            value.requires_grad != METHODS[name].merges and value.data_ptr() != frozen_weights[key].data_ptr()
            for key, value in trained.items()
        )
        buffers = {key: value for key, value in method.towers.named_buffers() if not key.startswith("pixel_")}
        assert buffers.keys() == frozen_weights.keys() - trained.keys()
        assert all(value.data_ptr() == frozen_weights[key].data_ptr() for key, value in buffers.items())
        method.double()
        values = [value for value in (*method.parameters(), *method.buffers()) if value.is_floating_point()]
        assert {value.dtype for value in values} == {torch.float64}
        assert {value.dtype for value in towers.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", [name for name in OWN_TOWERS if METHODS[name].trainable])
def test_trained_weights_are_float32_under_bfloat16(name, tmp_path):
    config = SMALL.model_copy(update={"clip": SMALL.clip.model_copy(update={"precision": "bfloat16"})})
    towers = load_clip(config.clip, float32=METHODS[name].trains_weights)
    assert (towers.visual.proj.dtype == torch.float32) == METHODS[name].trains_weights
    words = {"ink": CLASS_NAMES, "chalk": CLASS_NAMES}
    method = METHODS[name].build(config, towers, words)
    _, _, _, sets = small_problem()
    tokens = method_tokens(name, towers, list(words.values()))
    history = Trainer(towers, method, sets, tokens, SLOW, epochs=3, seed=5, precision="bfloat16").train()
    assert sum(history[-1].losses) < sum(history[0].losses)
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in method.parameters() if p.grad is not None} == {torch.float32}
    trained = TrainedAdapter(name, config, weights_fingerprint(towers), (words,), (method.state_dict(),))
    save_adapter(tmp_path / "trained.safetensors", trained)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        tokens = METHODS[name].tokenize(config, towers.tokenizer, words)
        original = Classifier(towers, [(words, tokens, method())], "bfloat16")
    reloaded = load_adapter(tmp_path / "trained.safetensors").classifier()
    assert torch.equal(reloaded.probabilities("ink", pixels), original.probabilities("ink", pixels))


@pytest.mark.parametrize("name", LEARNING)
def test_a_trained_method_is_loaded_under_bfloat16(name, tmp_path):
    config = SMALL.model_copy(update={"clip": SMALL.clip.model_copy(update={"precision": "bfloat16"})})
    towers = load_clip(config.clip, float32=METHODS[name].trains_weights)
    method = METHODS[name].build(config, towers, WORDS)
    if name in FITTED:
        fit(method, towers, WORDS)
    trained = TrainedAdapter(name, config, weights_fingerprint(towers), (WORDS,), (method.state_dict(),))
    save_adapter(tmp_path / "trained.safetensors", trained)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    probabilities = load_adapter(tmp_path / "trained.safetensors").classifier().probabilities("ink", pixels)
    assert probabilities.isfinite().all() and torch.allclose(probabilities.sum(1).float(), torch.ones(3), atol=1e-2)


def test_full_finetune_leaves_only_unused_tokens_and_key_biases_without_gradient():
    towers, _ = small_towers()
    method = build_method("full_finetune", towers, INK)
    adaptation = method()
    x = adaptation.encode_image(towers, torch.randn(3, 3, 16, 16, dtype=torch.float64), [3])
    z = adaptation.encode_text(towers, method_tokens("full_finetune", towers, [CLASS_NAMES]))
    F.cross_entropy(adaptation.logits(towers, x, z), torch.tensor([0, 2, 4])).backward()
    ids = full_ids(SMALL.clip.template)
    lengths = (ids.argmax(dim=1) + 1).tolist()  # to the end-of-text token, which has the largest number
    used = sorted({token for row, length in zip(ids.tolist(), lengths) for token in row[:length]})
    gradients = {name.removeprefix("towers."): p.grad for name, p in method.named_parameters()}
    for name, used_rows in (("text.token_embedding.weight", used), ("text.positional_embedding", range(max(lengths)))):
        rows = (gradients.pop(name) != 0).sum(dim=1)
        assert {i: rows[i].item() for i in rows.nonzero().flatten().tolist()} == dict.fromkeys(used_rows, 16)
    for name, gradient in gradients.items():
        if name.endswith("in_proj_bias"):
            query, key, value = gradient.chunk(3)
            assert key.abs().max() < 1e-14  # it adds the same to all logits of a query
            gradient = torch.cat([query, value])
        assert (gradient != 0).all(), name


def test_low_rank_updates_are_zero_initially_with_a_gradient_of_the_second_factor():
    towers, _ = small_towers()
    method = METHODS["clip_lora"].build(SMALL, towers, WORDS).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    x = method().encode_image(towers, images, [2, 1])
    assert torch.equal(x, towers.encode_image(images))
    x.square().sum().backward()
    for block in method.towers.vision_blocks:
        update = block.attention.in_proj_update
        assert update.down.weight.abs().max() <= 24**-0.5 and (update.down.weight.grad == 0).all()
        assert (update.up == 0).all() and (update.up.grad != 0).all()
