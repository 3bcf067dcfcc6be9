"""Every method on the small problem."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules

import methods
import torch
from reference_method import Training
from small_clip import CLASS_NAMES, PREPROCESSING
from small_problem import CONFIG, TASKS, small_problem

from pipeline.config import BUILTIN_DIGITS, Config, parse_config
from pipeline.methods.merging import MergedMethod
from pipeline.methods.method import FittedMethod
from pipeline.methods.registry import METHODS, VARIANTS
from pipeline.training.batches import TrainingSet
from pipeline.training.frozen_features import frozen_training_features
from pipeline.training.trainer import num_steps_per_epoch

REFERENCES = {
    module.name: import_module(f"methods.{module.name}").REFERENCE for module in iter_modules(methods.__path__)
}


def config_of_references(field: str, **values) -> Config:
    """Build a config with the options of every reference in this field: `small` or `start_options`."""
    sections = {METHODS[name].section: getattr(reference, field) for name, reference in REFERENCES.items()}
    return parse_config({name: options for name, options in sections.items() if options} | values)


SMALL = config_of_references("small", clip={"model": BUILTIN_DIGITS, "pretrained": BUILTIN_DIGITS})
FITTED = [name for name in REFERENCES if issubclass(METHODS[name], FittedMethod)]
TRAINED = [name for name in REFERENCES if METHODS[name].takes_steps]
LEARNING = [name for name in REFERENCES if METHODS[name].trainable]
WORDS = dict.fromkeys(TASKS, CLASS_NAMES)


def build_method(name, towers, words=WORDS, config=SMALL, seed=7):
    """Build a method away from its initial values, which would hide an error; a merged one from `sources`."""
    method = METHODS[name].build(config, towers, words).to(next(towers.parameters()).dtype)
    if isinstance(method, MergedMethod):
        (variant, *_) = METHODS[name].variants.values()
        seeds = [8] if variant.scope == "single-task" else [8, 9, 10]
        source = VARIANTS[variant.init_from].method
        method.sources = [build_method(source, towers, words, config, seed).state_dict() for seed in seeds]
        method.merge(config, method.sources)
        return method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in FITTED:
            fit(method, towers, words)
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return method


def fit(method, towers, words, images_per_class=3):
    """Fit a method to random features, and return these."""
    training = random_training(method.views, towers.embed_dim, words, images_per_class)
    method.fit(training.features, training.labels, training.text_features)
    return training


def random_training(views, width, words, images_per_class):
    """Return random features of training images, around those of their classes."""
    generator, features, labels, text_features = torch.Generator().manual_seed(3), [], [], []
    for names in words.values():
        z = torch.randn(len(names), width, generator=generator, dtype=torch.float64)
        label = torch.arange(len(names)).repeat(images_per_class)[:-1]  # the last class has one image less
        noise = torch.randn(len(label), views, width, generator=generator, dtype=torch.float64)
        features.append(z[label][:, None] + 2 * noise)
        labels.append(label)
        text_features.append(z)
    return Training(features, labels, text_features, [list(names) for names in words.values()])


def add_frozen_features(towers, sets, config=CONFIG, seed=5):
    num_steps = config.epochs * num_steps_per_epoch(map(len, sets), config.batch_size)
    return [
        replace(s, frozen_features=frozen_training_features(towers, s, num_steps, config, seed, "auto")) for s in sets
    ]


def task_sets(config=CONFIG):
    """Return the small problem's sets; without random crops, loading has made the images squares."""
    sets, size = small_problem()[3], PREPROCESSING.image_size
    if config.augmentation.random_crop:
        return sets
    return [replace(s, images=tuple(image[:, :size, :size] for image in s.images)) for s in sets]


def method_sets(name, towers, config=CONFIG):
    """Return the small problem's sets from which a method's batches are drawn, with frozen features."""
    set_by_task = dict(zip(TASKS, task_sets(config)))
    sets = [TrainingSet.union([set_by_task[t] for t in tasks]) for tasks in METHODS[name].tasks_per_set(TASKS)]
    return add_frozen_features(towers, sets, config)


def method_tokens(name, towers, class_names_per_task, config=SMALL):
    class_names = {str(number): names for number, names in enumerate(class_names_per_task)}
    return METHODS[name].tokenize(config, towers.tokenizer, class_names)
