"""Small CLIP models from open_clip model configs with random weights, for tests."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch

from pipeline.clip.torchvision_compat import ensure_torchvision

ensure_torchvision()

import open_clip  # noqa: E402
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP  # noqa: E402

from pipeline.clip.towers import ClipTowers  # noqa: E402
from pipeline.data.preprocessing import Preprocessing  # noqa: E402

PREPROCESSING = Preprocessing(16, "squash", "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
"""Unlike the defaults, so that none of them is noticed."""
CLASS_NAMES = ["cat", "tricycle", "the great wall of china", "post-it notes", "alarm clock"]


def small_open_clip(**options) -> torch.nn.Module:
    """Return a copy of a random model, which is faster than drawing its weights again."""
    return copy.deepcopy(_random_model(**options))


@lru_cache(maxsize=8)
def _random_model(
    vision_width: int = 24,
    text_width: int = 16,
    vision_layers: int = 3,
    text_layers: int = 2,
    quick_gelu: bool = True,
    custom_text: bool = False,
    layer_scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.nn.Module:
    """Build towers, by default of unequal widths and depths, with random weights away from trivial initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (CustomTextCLIP if custom_text else CLIP)(
            embed_dim=12,
            vision_cfg=CLIPVisionCfg(
                layers=vision_layers,
                width=vision_width,
                head_width=8,
                patch_size=8,
                image_size=16,
                ls_init_value=layer_scale,
            ),
            text_cfg=CLIPTextCfg(
                context_length=77,
                vocab_size=49408,
                width=text_width,
                heads=2,
                layers=text_layers,
                ls_init_value=layer_scale,
            ),
            quick_gelu=quick_gelu,
        ).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


@lru_cache
def tokenizer():
    """Build open_clip's tokenizer once: it takes 0.25 s."""
    return open_clip.SimpleTokenizer()


def small_towers(text_prompt_position: str = "after_sos", **options) -> tuple[ClipTowers, torch.nn.Module]:
    model = small_open_clip(**options)
    return ClipTowers(model, tokenizer(), PREPROCESSING, text_prompt_position), model
