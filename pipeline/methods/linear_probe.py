"""Linear probe: a weight vector for each class on the frozen image features, which starts as the class's text feature
(as in Wortsman et al., CVPR 2022), compared by cosine like it.

Classes with the same text share theirs, also across tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.clip.class_tokens import ClassTokens, class_tokens
from pipeline.clip.precision import autocast
from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.data.names import names_of
from pipeline.methods.adaptation import Adaptation


class LinearProbe(nn.Module):
    def __init__(self, config: Config, towers: ClipTowers, words: Mapping[str, Sequence[str]]):
        super().__init__()
        self.tasks = tuple(words)
        text_of_class = [(config.clip.template_of(task), of_class) for task in words for of_class in words[task]]
        number = {text: at for at, text in enumerate(dict.fromkeys(text_of_class))}
        self.weight_of_row = [number[text] for text in text_of_class for _ in names_of(text[1])]
        # As many tasks, since two of them may have one name in different classes.
        tokens = class_tokens(towers.tokenizer, [template for template, _ in number], [[own] for _, own in number])
        tokens = tokens.to(towers.device)
        with torch.no_grad(), autocast(towers.device, config.clip.precision):
            features = torch.cat(tokens.class_features(towers.encode_text(tokens)))
        self.weights = nn.Parameter(features.to(torch.promote_types(features.dtype, torch.float32)))  # (C, E)

    def forward(self) -> Adaptation:
        return Adaptation(class_features=self._rows)

    def _rows(self, tokens: ClassTokens) -> torch.Tensor:
        return self.weights[self.weight_of_row[tokens.first_row :][: len(tokens.suffix)]]
