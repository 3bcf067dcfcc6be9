"""CLIP as a classifier of several tasks, with or without prompts, its text features computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.precision import autocast
from pipeline.clip.towers import ClipTowers


class Classifier:
    """CLIP with the prompts of some tasks, its text features computed once.

    Args:
        words: task → words of its classes, by label.
        prompts: text prompts (T, K, b, d_l) and vision prompts (T, K, b, d_v) in the order of `words`, or None for
            zero-shot CLIP.
    """

    @torch.inference_mode()
    def __init__(
        self,
        towers: ClipTowers,
        template: str,
        words: dict[str, Sequence[str]],
        prompts: tuple[torch.Tensor, torch.Tensor] | None = None,
        precision: str = "auto",
    ):
        self.towers = towers
        self.precision = precision
        tokens = class_tokens(towers.tokenizer, template, list(words.values())).to(towers.device)
        text_prompts, self._vision_prompts = prompts or (None, None)
        with autocast(towers.device, precision):
            z = towers.encode_text(tokens, text_prompts)
        self._text_features = dict(zip(words, z.split(tokens.classes_per_task)))
        self._index = {task: at for at, task in enumerate(words)}

    @torch.inference_mode()
    def probabilities(self, task: str, pixels: torch.Tensor) -> torch.Tensor:
        """Class probabilities (B, C) of uint8 images (B, 3, S, S) by the prompts of `task`."""
        at = self._index[task]
        vision_prompts = None if self._vision_prompts is None else self._vision_prompts[at : at + 1]
        pixels = pixels.to(self.towers.device, non_blocking=pixels.is_pinned())
        images = self.towers.normalize_pixels(pixels)
        with autocast(self.towers.device, self.precision):
            x = self.towers.encode_image(images, vision_prompts, [len(images)])
        return self.towers.logits(x, self._text_features[task]).softmax(dim=1)
