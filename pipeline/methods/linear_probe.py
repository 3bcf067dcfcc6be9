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
        texts: dict[str, dict[str, None]] = {}  # template → its classes' words
        for task, of_task in words.items():
            texts.setdefault(config.clip.template_of(task), {}).update(dict.fromkeys(of_task))
        number = {text: at for at, text in enumerate((of, name) for of, names in texts.items() for name in names)}
        self.weight_of_row = [
            number[config.clip.template_of(task), of_class]
            for task, of_task in words.items()
            for of_class in of_task
            for _ in names_of(of_class)
        ]
        tokens = class_tokens(towers.tokenizer, list(texts), [list(names) for names in texts.values()])
        tokens = tokens.to(towers.device)
        with torch.no_grad(), autocast(towers.device, config.clip.precision):
            features = torch.cat(tokens.class_features(towers.encode_text(tokens)))
        self.weights = nn.Parameter(features.to(torch.promote_types(features.dtype, torch.float32)))  # (C, E)

    def forward(self) -> Adaptation:
        return Adaptation(class_features=self._rows)

    def _rows(self, tokens: ClassTokens) -> torch.Tensor:
        return self.weights[self.weight_of_row[tokens.first_row :][: len(tokens.suffix)]]
