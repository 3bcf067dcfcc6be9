"""Any image tower without tokens: ConvNeXt, ResNet, FastViT, Swin. It takes no prompts."""

from __future__ import annotations

from pipeline.clip.families.base import ImageTower


class BlackBox(ImageTower):
    """An image tower of which only the features are known.

    Args:
        reason: why it takes no prompts.
    """

    def __init__(self, reason: str):
        self.reason = reason
