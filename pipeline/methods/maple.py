"""MaPLe (Khattak et al., CVPR 2023): text prompts of the first layers, and a linear map of each into the image tower.

The first layer's text prompts stand in place of the template's first words and start as their embeddings; those of the
last prompted layer are carried on through the layers after it, in both towers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.methods.adaptation import Adaptation
from pipeline.seeds import derive_seed, normal


def first_words(template: str, towers: ClipTowers, prompts: torch.Tensor) -> torch.Tensor:
    """Prompts (b, d_l), of which the first are replaced by the embeddings of the words before the class name."""
    ids = torch.tensor(towers.tokenizer.encode(template.partition("{}")[0].strip())[: len(prompts)], dtype=torch.int64)
    words = towers.token_embedding(ids.to(towers.device)).detach().to(prompts)
    return torch.cat([words, prompts[len(words) :]])


class Maple(nn.Module):
    def __init__(self, config: Config, towers: ClipTowers, words: Mapping[str, Sequence[str]]):
        super().__init__()
        self.tasks = tuple(words)
        depth, length, width = config.maple.depth, config.maple.prompt_length, towers.text_width
        prompts = normal(depth, length, width, std=0.02, seed=config.seed, purpose="maple")
        prompts[0] = first_words(config.clip.template, towers, prompts[0])
        self.text_prompts = nn.Parameter(prompts)  # (K', b, d_l)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "maple projections"))
            self.projections = nn.ModuleList(nn.Linear(width, towers.vision_width) for _ in range(depth))

    def forward(self) -> Adaptation:
        vision = torch.stack([project(prompts) for project, prompts in zip(self.projections, self.text_prompts)])
        text, vision = (prompts.expand(len(self.tasks), -1, -1, -1) for prompts in (self.text_prompts, vision))
        return Adaptation(text, vision, text_carried=True, vision_carried=True)

    @staticmethod
    def check(config: Config, towers: ClipTowers) -> None:
        """Raises: UserError: more prompted layers than the towers have."""
        deepest = min(towers.text_depth, towers.vision_depth)
        if config.maple.depth > deepest:
            raise UserError(f"maple.depth={config.maple.depth}: the shallower tower has {deepest} layers")

    @staticmethod
    def template(of_config: str) -> str:
        """The prompts stand for the words before the class name."""
        return "{}" + of_config.partition("{}")[2]
