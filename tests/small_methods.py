"""Every method on the small problem."""

from __future__ import annotations

from dataclasses import replace

import torch
from small_clip import CLASS_WORDS
from small_problem import CONFIG, TASKS

from pipeline.clip.class_tokens import class_tokens
from pipeline.config import BUILTIN_DIGITS, Config
from pipeline.methods.registry import KINDS
from pipeline.training.frozen_features import frozen_training_features
from pipeline.training.loop import num_steps_per_epoch

SMALL = Config.model_validate(
    {
        "clip": {"model": BUILTIN_DIGITS, "pretrained": BUILTIN_DIGITS},
        "mmap": {"prompt_length": 2, "source_rows": 2},
        "coop": {"context_length": 3},
        "vpt": {"prompt_length": 2},
        "maple": {"prompt_length": 2, "depth": 2},
        "joint_prompts": {"prompt_length": 2},
        "mlp_prompts": {"prompt_length": 2, "source_width": 4},
        "promptsrc": {"prompt_length": 2, "depth": 2},
        "mvlpt": {"prompt_length": 2, "mixer_width": 4},
        "softcpt": {"context_length": 3, "meta_length": 2},
        "hipro": {"context_length": 3},
    }
)


TRAINED = [name for name, kind in KINDS.items() if kind.trained]
WORDS = dict.fromkeys(TASKS, CLASS_WORDS)


def built(name, towers, words=WORDS, config=SMALL):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        method = KINDS[name].build(config, towers, words).to(next(towers.parameters()).dtype)
        with torch.no_grad():
            for parameter in method.parameters():  # away from starts where a fault would not show
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return method


def with_frozen_features(towers, sets, config=CONFIG, seed=5):
    num_steps = config.epochs * num_steps_per_epoch((len(of.labels) for of in sets), config.batch_size)
    return [
        replace(of, frozen_features=frozen_training_features(towers, of, num_steps, config, seed, "auto"))
        for of in sets
    ]


def tokens_for(name, towers, words_per_task, config=SMALL):
    kind = KINDS[name]
    template = kind.template(config.clip.template)
    return class_tokens(towers.tokenizer, template, words_per_task, kind.num_carried(config))
