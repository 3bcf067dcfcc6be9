"""One matrix over all methods: what trains, what it computes, how it is saved."""

from __future__ import annotations

import copy
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
SLOW = CONFIG.model_copy(update={"learning_rate": 1e-3})
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


def open_clips_name(name):
    """Of a weight of ClipTowers."""
    for ours, theirs in {"text_blocks": "transformer.resblocks", "text_positions": "positional_embedding"}.items():
        name = name.replace(ours, theirs)
    return name


def with_weights(model, weights):
    """A copy of open_clip's model with these tensors in place of its parameters."""
    model = copy.deepcopy(model)
    for name, tensor in weights.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        del module._parameters[leaf]
        setattr(module, leaf, tensor)
    return model


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
    if name in ("bitfit", "full", "clip_lora"):
        trained = {open_clips_name(key.removeprefix("towers.")): p for key, p in method.named_parameters()}
        own = model.state_dict()
        if name == "clip_lora":
            blocks = [key.removesuffix(".in_proj_weight") for key in own if key.endswith("in_proj_weight")]
            assert len(trained) == 2 * len(blocks)
            low_rank = {
                block: zip(
                    trained[f"{block}.in_proj_update.up"], trained[f"{block}.in_proj_update.down.weight"].split(2)
                )
                for block in blocks
            }
            trained = {
                f"{block}.in_proj_weight": own[f"{block}.in_proj_weight"]
                + torch.cat([b @ a / 2 for b, a in low_rank[block]])  # alpha 1, rank 2
                for block in blocks
            }
        else:
            assert set(trained) == {key for key in own if name == "full" or key.endswith("bias")}
        model = with_weights(model, trained)
        return model.encode_image(images), model.encode_text(full_ids(template))
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
    scale = method.towers.logit_scale if name == "full" else model.logit_scale
    plain_logits = scale.exp() * F.cosine_similarity(plain[0][:, None], plain[1], dim=-1)
    ours, reference = (
        torch.autograd.grad(F.cross_entropy(logits, label), parameters)
        for logits in (adaptation.logits(towers, x, z), plain_logits)
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
    if KINDS[name].trains_weights:  # start as CLIP's
        own = towers.state_dict()
        for start in (first, other):
            assert all(torch.equal(value, own[key.removeprefix("towers.")]) for key, value in start.items())
    else:
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
        ("bitfit", Config(), 171_008),
        ("full", Config(), 149_620_737),
        ("clip_lora", Config(), 12 * 3 * 2 * 2 * (512 + 768)),
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


# Methods with towers of their own


def test_own_towers_hold_in_memory_and_files_only_what_trains():
    towers = load_clip(SMALL.clip)
    given = dict(towers.named_parameters())
    for name, trains in {
        "bitfit": lambda key: key.endswith("bias"),
        "full": lambda key: True,
        "clip_lora": lambda key: False,
    }.items():
        method = KINDS[name].build(SMALL, towers, TASKS)
        own = method.towers.state_dict(keep_vars=True)
        own = {key: value for key, value in own.items() if "in_proj_update" not in key}
        assert own.keys() == {key for key in given if trains(key)}
        assert all(value.requires_grad and value.data_ptr() != given[key].data_ptr() for key, value in own.items())
        buffers = {key: value for key, value in method.towers.named_buffers() if not key.startswith("pixel_")}
        assert buffers.keys() == given.keys() - own.keys()
        assert all(value.data_ptr() == given[key].data_ptr() for key, value in buffers.items())
        method.double()
        assert {value.dtype for value in (*method.parameters(), *method.buffers())} == {torch.float64}
        assert {value.dtype for value in towers.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["bitfit", "full", "clip_lora"])
def test_in_bfloat16_what_trains_is_float32(name, tmp_path):
    config = SMALL.model_copy(update={"clip": SMALL.clip.model_copy(update={"precision": "bfloat16"})})
    towers = load_clip(config.clip, float32=KINDS[name].trains_weights)
    assert (towers.visual.proj.dtype == torch.float32) == (name != "clip_lora")
    words = {"ink": CLASS_WORDS, "chalk": CLASS_WORDS}
    method = KINDS[name].build(config, towers, tuple(words))
    _, _, _, sets = small_problem()
    tokens = tokens_for(name, towers, list(words.values()))
    history, _ = train(towers, method, sets, tokens, SLOW, epochs=3, seed=5, precision="bfloat16")
    assert sum(history[-1].losses) < sum(history[0].losses)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in method.parameters())
    trained = TrainedPrompts(name, config, weights_fingerprint(towers), (words,), (method.state_dict(),))
    save_prompts(tmp_path / "trained.safetensors", trained)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        original = Classifier(towers, KINDS[name].template(config), [(words, method())], "bfloat16")
    again = load_prompts(tmp_path / "trained.safetensors").classifier()
    assert torch.equal(again.probabilities("ink", pixels), original.probabilities("ink", pixels))


def test_in_full_fine_tuning_only_what_the_texts_lack_and_key_biases_get_no_gradient():
    towers, _ = small_towers()
    method = built("full", towers, ["ink"])
    adaptation = method()
    x = adaptation.encode_image(towers, torch.randn(3, 3, 16, 16, dtype=torch.float64), [3])
    z = adaptation.encode_text(towers, tokens_for("full", towers, [CLASS_WORDS]))
    F.cross_entropy(adaptation.logits(towers, x, z), torch.tensor([0, 2, 4])).backward()
    ids = full_ids(SMALL.clip.template)
    lengths = (ids.argmax(dim=1) + 1).tolist()  # to the end-of-text token, which has the largest number
    used = sorted({number for row, length in zip(ids.tolist(), lengths) for number in row[:length]})
    gradients = {name.removeprefix("towers."): p.grad for name, p in method.named_parameters()}
    for name, seen in (("token_embedding.weight", used), ("text_positions", range(max(lengths)))):
        rows = (gradients.pop(name) != 0).sum(dim=1)
        assert {at: rows[at].item() for at in rows.nonzero().flatten().tolist()} == dict.fromkeys(seen, 16)
    for name, gradient in gradients.items():
        if name.endswith("in_proj_bias"):
            query, key, value = gradient.chunk(3)
            assert key.abs().max() < 1e-14  # it adds the same to all logits of a query
            gradient = torch.cat([query, value])
        assert (gradient != 0).all(), name


def test_low_rank_updates_start_at_zero_and_their_first_factor_waits_for_the_second():
    towers, _ = small_towers()
    method = KINDS["clip_lora"].build(SMALL, towers, TASKS).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    x = method().encode_image(towers, images, [2, 1])
    assert torch.equal(x, towers.encode_image(images))
    x.square().sum().backward()
    for block in method.towers.vision_blocks:
        update = block.attn.in_proj_update
        assert update.down.weight.abs().max() <= 24**-0.5 and (update.down.weight.grad == 0).all()
        assert (update.up == 0).all() and (update.up.grad != 0).all()
