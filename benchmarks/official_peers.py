"""Training steps of the authors' own code of MaPLe, CoOp, PromptSRC and CLIP-LoRA, from the user's checkouts.

Their classes are imported from the checkout, with stubs for dassl, the training framework, which a step does not need.
Towers, trained parameters, losses and settings are the authors'; their optimizer's update is not part of a step. Only
the precision differs, as float16 does not suit CPUs:

- float32: everything, also what the authors' code makes float16 in any precision.
- bfloat16: the authors' mixed precision (`PREC: amp`; CLIP-LoRA's autocast), with bfloat16 in place of float16, that
  is, autocast around the forward pass of float32 towers. Where they hold weights in float16 (PromptSRC its frozen
  image encoder, CLIP-LoRA its frozen CLIP except the attention), they are in bfloat16.

PromptSRC's frozen text features, which its code computes before the training, are those of the first of its 60
templates: their values do not affect the time of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import TEMPLATE, Step, autocast
from torch import Tensor, nn

from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.errors import UserError

# The defaults of their train.py, except PREC; and of CLIP-LoRA's run_utils.py.
MAPLE = {"N_CTX": 2, "CTX_INIT": "a photo of a", "PREC": "amp", "PROMPT_DEPTH": 9}
COOP = {"N_CTX": 16, "CTX_INIT": "", "CSC": False, "CLASS_TOKEN_POSITION": "end", "PREC": "amp"}
PROMPTSRC = {
    "N_CTX_VISION": 4,
    "N_CTX_TEXT": 4,
    "CTX_INIT": "a photo of a",
    "PREC": "amp",
    "PROMPT_DEPTH_VISION": 9,
    "PROMPT_DEPTH_TEXT": 9,
    "TEXT_LOSS_WEIGHT": 25,
    "IMAGE_LOSS_WEIGHT": 10,
}
CLIP_LORA = {"encoder": "both", "position": "all", "params": ["q", "k", "v"], "r": 2, "alpha": 1, "dropout_rate": 0.25}

DASSL = {
    "dassl": {},
    "dassl.engine": {"TRAINER_REGISTRY": SimpleNamespace(register=lambda: lambda trainer: trainer), "TrainerX": object},
    "dassl.metrics": {"compute_accuracy": None},
    "dassl.optim": {"build_optimizer": None, "build_lr_scheduler": None},
    "dassl.utils": {"load_pretrained_weights": None, "load_checkpoint": None},
}


@dataclass
class Peer:
    """A model of the authors' code, ready to train on one task."""

    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    """Images (B, 3, S, S) and labels (B,) → the loss, with autocast where the authors have it."""
    device: torch.device
    precision: str

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Name → parameter that the authors train."""
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def step(self, images: Tensor, labels: Tensor, num_tasks: int = 1) -> Step:
        """Return a step for each task, one after the other; images and labels are ordered by task, equally many of
        each. It returns the gradients of the last task, in the order of `trained`."""
        parameters = list(self.trained.values())
        batches = list(zip(images.chunk(num_tasks), labels.chunk(num_tasks)))

        def step() -> list[Tensor]:
            for task_images, task_labels in batches:
                for parameter in parameters:
                    parameter.grad = None
                with _authors_device(self.device, self.precision):
                    loss = self.loss(task_images, task_labels)
                loss.backward()  # torch's FLOP counter does not support autograd.grad here
            return [parameter.grad for parameter in parameters if parameter.grad is not None]

        return step


def maple(checkout: Path, model: nn.Module, class_names: Sequence[str], precision: str) -> Peer:
    clip, trainer = _import(checkout, "MaPLe", "clip.model", "trainers.maple")
    depths = {"vision_depth": 0, "language_depth": 0, "vision_ctx": 0, "language_ctx": 0}
    design = {"trainer": "MaPLe", **depths, "maple_length": MAPLE["N_CTX"]}
    module = _custom_clip(trainer, clip, design, "MAPLE", MAPLE, model, class_names, precision)
    return _autocast_peer(module, module, model, precision)


def coop(checkout: Path, model: nn.Module, class_names: Sequence[str], precision: str) -> Peer:
    clip, trainer = _import(checkout, "CoOp", "clip.model", "trainers.coop")
    module = _custom_clip(trainer, clip, None, "COOP", COOP, model, class_names, precision)
    return _autocast_peer(module, lambda images, labels: F.cross_entropy(module(images), labels), model, precision)


def promptsrc(checkout: Path, model: nn.Module, class_names: Sequence[str], precision: str) -> Peer:
    clip, trainer = _import(checkout, "PromptSRC", "clip.model", "trainers.promptsrc")
    design = {
        "trainer": "IVLP",
        "vision_depth": PROMPTSRC["PROMPT_DEPTH_VISION"],
        "language_depth": PROMPTSRC["PROMPT_DEPTH_TEXT"],
        "vision_ctx": PROMPTSRC["N_CTX_VISION"],
        "language_ctx": PROMPTSRC["N_CTX_TEXT"],
    }
    no_prompts = {"trainer": "IVLP", "vision_depth": 0, "language_depth": 0, "vision_ctx": 0, "language_ctx": 0}
    frozen = {
        "load_clip_to_cpu": lambda config, zero_shot_model: clip.build_model(model.state_dict(), no_prompts),
        "IMAGENET_TEMPLATES": trainer.IMAGENET_TEMPLATES[:1],
    }
    with patch.multiple(trainer, **frozen):
        module = _custom_clip(trainer, clip, design, "PROMPTSRC", PROMPTSRC, model, class_names, precision)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of PromptSRC.forward_backward."""
        cross_entropy, text, frozen_text, frozen_image, image, frozen_logits, logits = module(images, labels)
        text_loss = F.l1_loss(text, frozen_text) * PROMPTSRC["TEXT_LOSS_WEIGHT"]
        image_loss = F.l1_loss(image, frozen_image) * PROMPTSRC["IMAGE_LOSS_WEIGHT"]
        log_probabilities, frozen = F.log_softmax(logits, dim=1), F.log_softmax(frozen_logits, dim=1)
        logits_loss = F.kl_div(log_probabilities, frozen, reduction="sum", log_target=True) / logits.numel()
        return cross_entropy + logits_loss + text_loss + image_loss

    return _autocast_peer(module, loss, model, precision)


def clip_lora(checkout: Path, model: nn.Module, class_names: Sequence[str], precision: str) -> Peer:
    clip, tokenizer, loralib = _import(checkout, "CLIP-LoRA", "clip.model", "clip.clip", "loralib.utils")
    device = next(model.parameters()).device
    with _authors_device(device, precision):
        towers = clip.build_model(model.state_dict())
        # The backbone only chooses the layers of `position`, and ViT-B/32 has the same.
        loralib.apply_lora(SimpleNamespace(backbone="ViT-B/16", **CLIP_LORA), towers)
    loralib.mark_only_lora_as_trainable(towers)
    towers.to(device).train()
    texts = [TEMPLATE.format(name) for name in class_names]

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the training loop in lora.py, which tokenizes the classes in every step."""
        with autocast(device, precision):
            text = towers.encode_text(tokenizer.tokenize(texts).to(device))
        text = text / text.norm(dim=-1, keepdim=True)
        with autocast(device, precision):
            image = towers.encode_image(images)
        image = image / image.norm(dim=-1, keepdim=True)
        return F.cross_entropy(100 * image @ text.t(), labels)

    return Peer(towers, loss, device, precision)


@dataclass(frozen=True)
class Source:
    repository: str
    files: tuple[str, ...]
    """Files by which a checkout is recognized."""
    build: Callable[[Path, nn.Module, Sequence[str], str], Peer]
    """Checkout, open_clip's ViT-B (MaPLe's code hard-codes its widths), class names, precision → a peer on the model's
    device, with a copy of its weights."""


GITHUB = "https://github.com"
# COOP.md tells CoOp's own checkout from MaPLe's, whose trainers/coop.py runs on the CLIP of MaPLe.
SOURCES = {
    "MaPLe": Source(
        f"{GITHUB}/muzairkhattak/multimodal-prompt-learning", ("trainers/maple.py", "clip/model.py"), maple
    ),
    "CoOp": Source(f"{GITHUB}/KaiyangZhou/CoOp", ("trainers/coop.py", "clip/model.py", "COOP.md"), coop),
    "PromptSRC": Source(f"{GITHUB}/muzairkhattak/PromptSRC", ("trainers/promptsrc.py", "clip/model.py"), promptsrc),
    "CLIP-LoRA": Source(f"{GITHUB}/MaxZanella/CLIP-LoRA", ("loralib/utils.py", "clip/model.py"), clip_lora),
}


def add_peer_options(parser: argparse.ArgumentParser) -> None:
    for name in SOURCES:
        parser.add_argument(f"--{name.lower()}", type=Path, help=f"checkout of the official {name}")


def given_checkouts(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return peer → checkout, of those given.

    Raises:
        UserError: a folder is not a checkout of the peer.
    """
    options = {name: getattr(arguments, name.lower().replace("-", "_")) for name in SOURCES}
    checkouts = {name: checkout for name, checkout in options.items() if checkout}
    for name, checkout in checkouts.items():
        check_checkout(name, checkout)
    return checkouts


def check_checkout(name: str, checkout: Path) -> None:
    for file in SOURCES[name].files:
        if not (checkout / file).is_file():
            raise UserError(f"{checkout} has no {file}: run git clone {SOURCES[name].repository}")


def build_peers(
    checkouts: Mapping[str, Path], model: nn.Module, class_names: Sequence[str], precision: str
) -> dict[str, Peer]:
    return {name: SOURCES[name].build(checkout, model, class_names, precision) for name, checkout in checkouts.items()}


def _import(checkout: Path, peer: str, *modules: str) -> list[ModuleType]:
    """Import modules of the checkout."""
    check_checkout(peer, checkout)
    ensure_torchvision()
    with _only_from(checkout):
        return [importlib.import_module(module) for module in modules]


@contextlib.contextmanager
def _only_from(checkout: Path) -> Iterator[None]:
    """Import `clip` and the like from this checkout, and remove them afterwards: all peers use these names."""
    modules = _take_modules()
    for name, content in DASSL.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    path = str(checkout.resolve())
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)
        _take_modules()
        sys.modules.update(modules)


def _take_modules() -> dict[str, ModuleType]:
    packages = ("clip", "trainers", "datasets", "dassl", "loralib")
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


@contextlib.contextmanager
def _authors_device(device: torch.device, precision: str) -> Iterator[None]:
    """Run code that says `.cuda()` on this device, and code that says `.half()` in this precision; silence its prints,
    as stdout is for the benchmark's table."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with (
        patch.object(Tensor, "cuda", lambda tensor, *_, **__: tensor.to(device)),
        patch.object(Tensor, "half", lambda tensor: tensor.to(dtype)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


def _autocast_peer(
    module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], model: nn.Module, precision: str
) -> Peer:
    device = next(model.parameters()).device

    def autocast_loss(images: Tensor, labels: Tensor) -> Tensor:
        with autocast(device, precision):
            return loss(images, labels)

    return Peer(module, autocast_loss, device, precision)


def _custom_clip(
    trainer: ModuleType,
    clip: ModuleType,
    design: dict[str, object] | None,
    section: str,
    options: dict[str, object],
    model: nn.Module,
    class_names: Sequence[str],
    precision: str,
) -> nn.Module:
    """Build the trainer's CustomCLIP as its build_model does."""
    device = next(model.parameters()).device
    config = SimpleNamespace(
        TRAINER=SimpleNamespace(**{section: SimpleNamespace(**options)}),
        INPUT=SimpleNamespace(SIZE=model.visual.image_size),
        OPTIM=SimpleNamespace(MAX_EPOCH=50),  # PromptSRC reads it, and a step does not need it
    )
    with _authors_device(device, precision):
        towers = clip.build_model(model.state_dict(), *([design] if design else []))
        module = trainer.CustomCLIP(config, class_names, towers.float())
    for name, parameter in module.named_parameters():
        is_trained = "prompt_learner" in name and "ZS_image_encoder" not in name or "VPT" in name
        parameter.requires_grad_(is_trained)
        if is_trained:  # MaPLe makes one projection float16, which its own gradient scaling refuses
            parameter.data = parameter.data.float()
    return module.to(device).train()
