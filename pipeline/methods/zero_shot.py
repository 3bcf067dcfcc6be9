"""Zero-shot CLIP (Radford et al., ICML 2021): nothing is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import ClassNames, Method, Variant, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("zero_shot")
class ZeroShot(Method):
    title = "zero-shot"
    trainable = False
    takes_steps = False
    modifies_image_encoder = False
    variants = {"zero_shot": Variant("zero-shot", "zero_shot", "multi-task")}

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()

    def forward(self) -> Adaptation:
        return Adaptation()
