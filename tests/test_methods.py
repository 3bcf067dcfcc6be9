"""One matrix over all methods: what trains, what it computes, how it is saved."""

from __future__ import annotations

import typing

import pytest
import torch
import torch.nn.functional as F
from plain_towers import plain_encode_image, plain_encode_text
from small_clip import CLASS_WORDS, small_towers, tokenizer
from small_problem import CONFIG, TASKS, small_problem

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.load import load_clip, towers_without_weights, weights_fingerprint
from pipeline.config import BUILTIN_DIGITS, ClipConfig, Config, MapleConfig, Method, MlpPromptsConfig, VptConfig
from pipeline.errors import UserError
from pipeline.methods.classifier import Classifier
from pipeline.methods.prompt_file import TrainedPrompts, load_prompts, save_prompts
from pipeline.methods.registry import ALWAYS, KINDS, VERSIONS, kind_of
from pipeline.stages.group_trainings import random_groups
from pipeline.training.loop import train

SMALL = Config.model_validate(
    {
        "clip": {"model": BUILTIN_DIGITS, "pretrained": BUILTIN_DIGITS},
        "mmap": {"prompt_length": 2, "source_rows": 2},
        "coop": {"context_length": 3},
        "vpt": {"prompt_length": 2},
        "maple": {"prompt_length": 2, "depth": 2},
        "joint_prompts": {"prompt_length": 2},
        "mlp_prompts": {"prompt_length": 2, "source_width": 4},
    }
)
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


def built(name, towers, tasks=TASKS, config=SMALL):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        method = KINDS[name].build(config, towers, tasks).to(next(towers.parameters()).dtype)
        with torch.no_grad():
            for parameter in method.parameters():  # away from starts where a fault would not show
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return method


def tokens_for(name, towers, words_per_task):
    kind = KINDS[name]
    return class_tokens(towers.tokenizer, kind.template(SMALL), words_per_task, kind.num_carried(SMALL))


def full_ids(template):
    return tokenizer()([template.format(word) for word in CLASS_WORDS])


def plain_features(name, method, model, images):
    """Features (B, E), (C, E) of one task by each method's own definition, with the plain towers."""
    vision_depth, text_depth = len(model.visual.transformer.resblocks), len(model.transformer.resblocks)
    template = SMALL.clip.template
    if name in ("mmap", "mmap_shared"):
        parts = (method.group, method.task) if name == "mmap" else (method.mmap,)
        depth = min(text_depth, vision_depth)
        of_layers = {
            tower: [
                torch.cat([torch.kron(getattr(of, tower)[0, k], of.source[0, k]) for of in parts]) for k in range(depth)
            ]
            for tower in ("text_scaling", "vision_scaling")
        }
        text, vision = map(torch.stack, of_layers.values())
        return plain_encode_image(model, images, vision), plain_encode_text(model, full_ids(template), text)
    if name == "coop":
        z = plain_encode_text(model, full_ids("{}."), method.context[None], carried=True)
        return model.encode_image(images), z
    if name == "vpt":
        return plain_encode_image(model, images, method.prompts), model.encode_text(full_ids(template))
    if name == "maple":
        vision = torch.stack([p @ f.weight.T + f.bias for f, p in zip(method.projections, method.text_prompts)])
        return (
            plain_encode_image(model, images, vision, carried=True),
            plain_encode_text(model, full_ids("{}."), method.text_prompts, carried=True),
        )
    if name == "clip_adapter":
        x = model.encode_image(images)
        first, _, second, _ = method.bottleneck
        adapted = (second.weight @ (first.weight @ x.T + first.bias[:, None]).clamp(min=0) + second.bias[:, None]).T
        return 0.2 * adapted.clamp(min=0) + 0.8 * x, model.encode_text(full_ids(template))
    if name == "joint_prompts":
        return (
            plain_encode_image(model, images, method.vision_prompts),
            plain_encode_text(model, full_ids(template), method.text_prompts),
        )
    assert name == "mlp_prompts"
    text, vision = (
        torch.stack([p @ f.weight.T + f.bias for f, p in zip(layers, method.source)])
        for layers in (method.text_layers, method.vision_layers)
    )
    return plain_encode_image(model, images, vision), plain_encode_text(model, full_ids(template), text)


def test_the_config_names_the_registry():
    assert set(typing.get_args(Method)) | set(ALWAYS) == set(VERSIONS)
    assert {version.kind for version in VERSIONS.values()} == set(KINDS)
    with pytest.raises(UserError, match="'lora' is not known; methods: mmap, mmap_shared, coop"):
        kind_of("lora")


@pytest.mark.parametrize("name", KINDS)
def test_a_method_is_its_plain_definition(name):
    towers, model = small_towers()
    method = built(name, towers, ["ink"])
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    adaptation = method()
    x = adaptation.encode_image(towers, images, [3])
    z = adaptation.encode_text(towers, tokens_for(name, towers, [CLASS_WORDS]))
    plain = plain_features(name, method, model, images)
    for ours, reference in zip((x, z), plain):
        torch.testing.assert_close(ours, reference, **TOLERANCE)
    parameters = list(method.parameters())
    label = torch.tensor([0, 2, 4])
    ours, reference = (
        torch.autograd.grad(F.cross_entropy(towers.logits(*features), label), parameters)
        for features in ((x, z), plain)
    )
    for gradient, expected in zip(ours, reference):
        torch.testing.assert_close(gradient, expected, **TOLERANCE)


@pytest.mark.parametrize("name", KINDS)
def test_all_of_a_method_trains_and_nothing_else(name):
    towers, _, _, sets = small_problem()
    method = built(name, towers)
    frozen = {key: value.clone() for key, value in towers.state_dict().items()}
    before = {key: value.clone() for key, value in method.state_dict().items()}
    tokens = tokens_for(name, towers, [CLASS_WORDS, CLASS_WORDS])
    history, _ = train(towers, method, sets, tokens, CONFIG, epochs=3, seed=5)
    assert all(torch.equal(value, frozen[key]) for key, value in towers.state_dict().items())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())
    assert not any(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    first, last = (sum(sum(record.losses) for record in part) for part in (history[:4], history[-4:]))
    assert last < first


@pytest.mark.parametrize("name", KINDS)
def test_saved_and_loaded_a_method_predicts_the_same(name, tmp_path):
    towers = load_clip(SMALL.clip)
    words = {"ink": ["one", "two"], "neon": ["one", "two", "three"]}
    method = built(name, towers, tuple(words))
    trained = TrainedPrompts(name, SMALL, weights_fingerprint(towers), (words,), (method.state_dict(),))
    save_prompts(tmp_path / "trained.safetensors", trained)
    loaded = load_prompts(tmp_path / "trained.safetensors")
    assert loaded.num_parameters == sum(p.numel() for p in method.parameters())
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        original = Classifier(towers, KINDS[name].template(SMALL), [(words, method())])
    again = loaded.classifier()
    for task in words:
        assert torch.equal(again.probabilities(task, pixels), original.probabilities(task, pixels))


@pytest.mark.parametrize("name", KINDS)
def test_starts_do_not_depend_on_the_machine_or_the_tasks(name):
    towers, _ = small_towers()
    torch.manual_seed(1)
    first = KINDS[name].build(SMALL, towers, ["ink"]).state_dict()
    torch.manual_seed(2)
    again = KINDS[name].build(SMALL, towers, ["ink"]).state_dict()
    other = KINDS[name].build(SMALL.model_copy(update={"seed": 2}), towers, ["ink"]).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize(
    "name, config, expected",
    [
        ("coop", Config(), 16 * 512),
        ("vpt", Config(vpt=VptConfig(prompt_length=18)), 165_888),
        ("maple", Config(), 3_555_072),
        ("maple", Config(maple=MapleConfig(depth=12, prompt_length=12)), 4_801_536),
        ("clip_adapter", Config(), 131_712),
        ("mlp_prompts", Config(mlp_prompts=MlpPromptsConfig()), 3_959_808),
        ("joint_prompts", Config(), 12 * 8 * (512 + 768)),
    ],
)
def test_parameter_counts_of_vit_b_16(name, config, expected):
    """Of one group of tasks."""
    towers = towers_without_weights(ClipConfig())
    towers.token_embedding.to_empty(device="cpu")
    method = KINDS[name].build(config, towers, ["ink", "chalk"])
    assert sum(p.numel() for p in method.parameters()) == expected


def test_a_maple_deeper_than_the_towers_is_refused():
    towers, _ = small_towers()
    with pytest.raises(UserError, match="maple.depth=9: the shallower tower has 2 layers"):
        KINDS["maple"].check(Config(), towers)


def test_random_groups_have_the_sizes_asked_for_and_depend_on_the_seed_alone():
    tasks = [f"task {number}" for number in range(9)]
    drawn = [random_groups(tasks, [4, 3, 2], seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for groups in drawn:
        assert [len(group) for group in groups] == [4, 3, 2]
        assert sorted(task for group in groups for task in group) == tasks
