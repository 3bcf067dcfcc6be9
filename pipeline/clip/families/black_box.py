"""Any image tower without tokens: ConvNeXt, ResNet, FastViT, Swin. It takes no prompts."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.clip.families.base import ImageTower
from pipeline.clip.families.timm_vit import timm_output_dim


class BlackBox(ImageTower):
    """An image tower of which only the features are known.

    Args:
        visual: a module called with images (B, 3, H, W).
        reason: why it takes no prompts.
    """

    def __init__(self, visual: Any, reason: str):
        self.visual, self.reason = visual, reason
        self.output_dim = timm_output_dim(visual) if hasattr(visual, "trunk") else visual.output_dim

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)
