"""One training step of the official MaPLe and CoOp code, from the user's checkouts.

Their classes are imported from the checkout, with stubs for dassl, the training framework, which a step does not need.
Towers, prompts and settings are the authors'; only the precision is float32 (theirs is float16, which does not suit
CPUs), and MaPLe still rounds its vision and deep prompts to float16.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.errors import UserError

MAPLE_REPOSITORY = "https://github.com/muzairkhattak/multimodal-prompt-learning"
COOP_REPOSITORY = "https://github.com/KaiyangZhou/CoOp"
# The defaults of their train.py, except the precision.
MAPLE = {"N_CTX": 2, "CTX_INIT": "a photo of a", "PREC": "fp32", "PROMPT_DEPTH": 9}
COOP = {"N_CTX": 16, "CTX_INIT": "", "CSC": False, "CLASS_TOKEN_POSITION": "end", "PREC": "fp32"}

DASSL = {
    "dassl": {},
    "dassl.engine": {"TRAINER_REGISTRY": SimpleNamespace(register=lambda: lambda trainer: trainer), "TrainerX": object},
    "dassl.metrics": {"compute_accuracy": None},
    "dassl.optim": {"build_optimizer": None, "build_lr_scheduler": None},
    "dassl.utils": {"load_pretrained_weights": None, "load_checkpoint": None},
}


def maple_step(
    checkout: Path,
    model: nn.Module,
    class_names: Sequence[str],
    images: Tensor,
    labels: Tensor,
    device: torch.device | str,
) -> Callable[[], list[Tensor]]:
    """Return a step of MaPLe on images (B, 3, S, S) and labels (B,), which returns the gradients of its parameters.

    `model` is an open_clip ViT-B (MaPLe's code hard-codes its widths); the peer gets a copy of its weights.
    """
    clip, trainer = _peer_modules(checkout, "maple", ["trainers/maple.py", "clip/model.py"], MAPLE_REPOSITORY)
    depths = {"vision_depth": 0, "language_depth": 0, "vision_ctx": 0, "language_ctx": 0}
    design = {"trainer": "MaPLe", **depths, "maple_length": MAPLE["N_CTX"]}
    towers = clip.build_model(model.state_dict(), design)
    peer = _custom_clip(trainer, towers, "MAPLE", MAPLE, class_names, images, device)
    images, labels = images.to(device), labels.to(device)
    return _step(peer, lambda: peer(images, labels))


def coop_step(
    checkout: Path,
    model: nn.Module,
    class_names: Sequence[str],
    images: Tensor,
    labels: Tensor,
    device: torch.device | str,
) -> Callable[[], list[Tensor]]:
    """Return a step of CoOp on images (B, 3, S, S) and labels (B,), which returns the context's gradient in a list."""
    # COOP.md tells CoOp's own checkout from MaPLe's, whose trainers/coop.py runs on the CLIP of MaPLe.
    clip, trainer = _peer_modules(checkout, "coop", ["trainers/coop.py", "clip/model.py", "COOP.md"], COOP_REPOSITORY)
    peer = _custom_clip(trainer, clip.build_model(model.state_dict()), "COOP", COOP, class_names, images, device)
    images, labels = images.to(device), labels.to(device)
    return _step(peer, lambda: F.cross_entropy(peer(images), labels))


def _peer_modules(checkout: Path, trainer: str, files: list[str], repository: str) -> tuple[ModuleType, ModuleType]:
    """Import clip.model and trainers.<trainer> of the checkout."""
    for file in files:
        if not (checkout / file).is_file():
            raise UserError(f"{checkout} has no {file}: run git clone {repository}")
    ensure_torchvision()
    with _only_from(checkout):
        return importlib.import_module("clip.model"), importlib.import_module(f"trainers.{trainer}")


@contextlib.contextmanager
def _only_from(checkout: Path) -> Iterator[None]:
    """Import `clip` and `trainers` from this checkout, and remove them afterwards: all peers use these names."""
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
    names = [name for name in sys.modules if name.partition(".")[0] in ("clip", "trainers", "datasets", "dassl")]
    return {name: sys.modules.pop(name) for name in names}


def _custom_clip(
    trainer: ModuleType,
    towers: nn.Module,
    section: str,
    options: dict[str, object],
    class_names: Sequence[str],
    images: Tensor,
    device: torch.device | str,
) -> nn.Module:
    """Build the trainer's CustomCLIP as its build_model does."""
    config = SimpleNamespace(
        TRAINER=SimpleNamespace(**{section: SimpleNamespace(**options)}),
        INPUT=SimpleNamespace(SIZE=tuple(images.shape[-2:])),
    )
    with contextlib.redirect_stdout(sys.stderr):  # they print to stdout, which is for the benchmark's table
        peer = trainer.CustomCLIP(config, class_names, towers.float())
    for name, parameter in peer.named_parameters():
        parameter.requires_grad_("prompt_learner" in name)
    return peer.float().to(device).train()  # float again: MaPLe makes one projection float16 for every PREC


def _step(peer: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]

    def step() -> list[Tensor]:
        for parameter in trained:
            parameter.grad = None
        loss().backward()  # torch's FLOP counter does not support autograd.grad here
        return [parameter.grad for parameter in trained]

    return step
