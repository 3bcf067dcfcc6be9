"""MmAP: Kronecker prompts, parameter counts, per-task gradients, group and task prompts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_clip import CLASS_NAMES, small_towers

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.load import build_meta_towers
from pipeline.config import CONFIGS, ClipConfig, MmapConfig, load_yaml
from pipeline.errors import UserError
from pipeline.methods.mmap import GroupMmap, MmapShape, MmapStack, SharedMmap, kronecker
from pipeline.seeds import derive_seed
from pipeline.training.snapshots import layer_norms

TASKS = ("ink", "chalk", "neon")
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows, repeats", [(8, 1), (4, 2), (1, 8)])
def test_prompts_are_the_kronecker_product(rows, repeats):
    shape = MmapShape(depth=3, sources=3, b=8, m=rows, n=4, text_width=8, vision_width=12)
    stack = MmapStack(shape, seeds=[1, 2]).double()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_()
    text, vision = stack()
    assert text.shape == (2, 3, 8, 8) and vision.shape == (2, 3, 8, 12)
    assert stack.text_scaling.shape == (2, 3, repeats, 2)
    for i in range(2):
        for k in range(3):
            torch.testing.assert_close(
                text[i, k], torch.kron(stack.text_scaling[i, k], stack.source[i, k]), **TOLERANCE
            )
            torch.testing.assert_close(
                vision[i, k], torch.kron(stack.vision_scaling[i, k], stack.source[i, k]), **TOLERANCE
            )


def test_one_source_for_all_layers():
    shape = MmapShape(depth=3, sources=1, b=4, m=4, n=4, text_width=8, vision_width=12)
    stack = MmapStack(shape, seeds=[1])
    text, _ = stack()
    assert stack.source.shape == (1, 1, 4, 4)
    assert torch.equal(text[0, 0], torch.kron(torch.ones(1, 2), stack.source[0, 0]))
    assert torch.equal(text[0, 0], text[0, 2])
    assert shape.num_parameters == sum(p.numel() for p in stack.parameters())


def test_initial_prompts_have_the_given_standard_deviation():
    shape = MmapShape(depth=12, sources=12, b=8, m=8, n=256, text_width=512, vision_width=768)
    text, vision = MmapStack(shape, seeds=[3], init_std=0.02)()
    assert text.std().item() == pytest.approx(0.02, rel=0.03)
    assert vision.std().item() == pytest.approx(0.02, rel=0.03)


def test_parameter_counts_of_vit_b_16():
    towers = build_meta_towers(ClipConfig())
    assert towers.logit_scale.is_meta
    assert sum(p.numel() for p in towers.parameters()) == 149_620_737

    shape = MmapShape.of(MmapConfig(), towers)
    assert (shape.b, shape.m, shape.n, shape.depth) == (8, 8, 256, 12)
    assert shape.num_parameters == 24_636
    one_group = GroupMmap(shape, ["a", "b", "c", "d"], seed=1)
    assert sum(p.numel() for p in one_group.parameters()) == 123_180

    overlay = MmapConfig(**load_yaml(CONFIGS / "paper_parameters.yaml")["mmap"])
    small = MmapShape.of(overlay, towers)
    groups = [GroupMmap(small, tasks, seed=1) for tasks in (["a", "b", "c"], ["d"])]
    assert sum(p.numel() for group in groups for p in group.parameters()) == 129_384


def test_shapes_that_do_not_fit_the_towers_are_refused():
    towers = build_meta_towers(ClipConfig(model="ViT-L-14", pretrained=None))
    assert MmapShape.of(MmapConfig(), towers).depth == 12
    with pytest.raises(UserError, match=r"mmap\.depth=13.*24; valid: 1 to 12"):
        MmapShape.of(MmapConfig(depth=13), towers)
    with pytest.raises(UserError, match=r"source_columns=7 must divide"):
        MmapShape.of(MmapConfig(source_columns=7), towers)


@pytest.fixture(scope="module")
def problem():
    """Towers, tokens of three tasks (with different numbers of classes), images and labels, two images per task."""
    towers, _ = small_towers()
    tokens = class_tokens(towers.tokenizer, "a photo of a {}.", [CLASS_NAMES, CLASS_NAMES[:3], CLASS_NAMES[1:]])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=generator)
    labels = [torch.tensor([0, 4]), torch.tensor([2, 0]), torch.tensor([3, 1])]
    return towers, tokens, images, labels


def task_losses(problem, adaptation):
    towers, tokens, images, labels = problem
    x = adaptation.encode_image(towers, images, [2, 2, 2]).split(2)
    z = adaptation.encode_text(towers, tokens).split(tokens.classes_per_task)
    return [F.cross_entropy(towers.logits(*pair), task_labels) for *pair, task_labels in zip(x, z, labels)]


def mmap_shape(towers) -> MmapShape:
    return MmapShape.of(MmapConfig(prompt_length=4, source_rows=2), towers)


@pytest.mark.parametrize("shared_source", [False, True])
def test_snapshot_gradients_equal_one_autograd_call_per_task(problem, shared_source):
    towers = problem[0]
    shape = MmapShape.of(MmapConfig(prompt_length=4, source_rows=2, shared_source=shared_source), towers)
    prompts = SharedMmap(shape, TASKS, seed=1, init_std=0.5).double()
    sum(task_losses(problem, prompts())).backward()
    gradients = prompts.task_gradients()
    assert gradients.shape == (3, shape.num_parameters)

    parameters = list(prompts.parameters())
    for t in range(3):
        loss = task_losses(problem, prompts())[t]
        reference = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        assert reference.abs().max() > 1e-6
        torch.testing.assert_close(gradients[t], reference, **TOLERANCE)
    total = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(total, gradients.sum(0), **TOLERANCE)

    norms = layer_norms(gradients[0], prompts.gradient_layout())
    squares = [torch.zeros((), dtype=torch.float64) for _ in norms]
    for parameter, part in zip(parameters, gradients[0].split([p.numel() for p in parameters])):
        layers = part.view(parameter.shape[1:])
        if len(layers) == len(norms):
            squares = [square + layer.square().sum() for square, layer in zip(squares, layers)]
    torch.testing.assert_close(norms, torch.stack(squares).sqrt().float())


def test_a_group_step_is_the_sum_of_the_tasks_steps(problem):
    """Eq. 11: the group prompt gets all tasks' gradients; Eq. 12: a task prompt only its own task's."""
    prompts = GroupMmap(mmap_shape(problem[0]), TASKS, seed=1, init_std=0.5).double()
    sum(task_losses(problem, prompts())).backward()
    group_gradients = {name: p.grad.clone() for name, p in prompts.named_parameters()}
    gradients_by_task = []
    for t in range(3):
        prompts.zero_grad()
        task_losses(problem, prompts())[t].backward()
        gradients_by_task.append({name: p.grad.clone() for name, p in prompts.named_parameters()})
    for name, gradient in group_gradients.items():
        torch.testing.assert_close(
            gradient, sum(task_gradients[name] for task_gradients in gradients_by_task), **TOLERANCE
        )
        if name.startswith("task."):
            for t, task_gradients in enumerate(gradients_by_task):
                other_tasks = [i for i in range(3) if i != t]
                assert task_gradients[name][t].abs().max() > 0
                assert torch.count_nonzero(task_gradients[name][other_tasks]) == 0


def test_layers_see_group_prompts_then_task_prompts(problem):
    prompts = GroupMmap(mmap_shape(problem[0]), TASKS, seed=1)
    adaptation = prompts()
    text = adaptation.text_prompts
    assert text.shape[2] == adaptation.vision_prompts.shape[2] == 8
    for t in range(3):
        assert torch.equal(text[t, :, :4], prompts.group()[0][0])
        assert torch.equal(text[t, :, 4:], prompts.task()[0][t])


def test_initial_task_prompts_do_not_depend_on_the_group(problem):
    shape = mmap_shape(problem[0])
    multi_task, single_task = GroupMmap(shape, TASKS, seed=1), GroupMmap(shape, ["neon"], seed=1)
    assert torch.equal(multi_task.task.source[2], single_task.task.source[0])
    assert torch.equal(multi_task.group.source, single_task.group.source)
    assert not torch.equal(multi_task.task.source[0], multi_task.task.source[1])
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")


def test_kronecker_gradients_do_not_mix_batch_entries():
    scaling = torch.randn(2, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    source = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kronecker, (scaling, source))
    original = copy.deepcopy(source)
    kronecker(scaling, source)[0].sum().backward()
    assert torch.count_nonzero(source.grad[1]) == 0 and torch.equal(original, source)
