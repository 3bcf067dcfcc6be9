"""Linear probe: a weight vector for each class on the frozen image features, which starts as the class's text feature
(as in Wortsman et al., CVPR 2022), compared by cosine like it.

Classes with the same text share theirs, also across tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.clip.class_tokens import ClassTokens, class_tokens
from pipeline.clip.precision import autocast
from pipeline.data.names import split_synonyms
from pipeline.lazy_torch import nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("linear_probe")
class LinearProbe(Method):
    title = "linear probe"
    modifies_image_encoder = False

    class Options(MethodConfig):
        """Linear probe: a weight vector for each class."""

        training: TrainingOverrides = TrainingOverrides(epochs=20, batch_size=32, optimizer="adamw", learning_rate=1e-3)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        text_of_class = [
            (config.clip.template_for(task), of_class) for task in class_names for of_class in class_names[task]
        ]
        number = {text: at for at, text in enumerate(dict.fromkeys(text_of_class))}
        self.weight_of_row = [number[text] for text in text_of_class for _ in split_synonyms(text[1])]
        # As many tasks, since two of them may have one name in different classes.
        tokens = class_tokens(towers.tokenizer, [template for template, _ in number], [[own] for _, own in number])
        tokens = tokens.to(towers.device)
        with torch.no_grad(), autocast(towers.device, config.clip.precision):
            features = torch.cat(tokens.pool_names_to_classes(towers.encode_text(tokens)))
        self.weights = nn.Parameter(features.to(torch.promote_types(features.dtype, torch.float32)))  # (C, E)

    def forward(self) -> Adaptation:
        return Adaptation(text_features=self._rows)

    def _rows(self, tokens: ClassTokens) -> torch.Tensor:
        return self.weights[self.weight_of_row[tokens.first_row :][: len(tokens.suffix)]]
