"""Linear probe: a weight vector per class on the frozen image features, initialized with the class's text feature (as
in Wortsman et al., CVPR 2022) and compared by cosine.

Classes with the same text share a vector, also across tasks.
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
        """Linear probe: a weight vector per class."""

        training: TrainingOverrides = TrainingOverrides(epochs=20, batch_size=32, optimizer="adamw", learning_rate=1e-3)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        class_texts = [
            (config.clip.template_for(task), class_name) for task in class_names for class_name in class_names[task]
        ]
        index_by_text = {text: index for index, text in enumerate(dict.fromkeys(class_texts))}
        self.class_of_weight = [class_texts.index(text) for text in index_by_text]
        self.weight_index_of_row = [index_by_text[text] for text in class_texts for _ in split_synonyms(text[1])]
        # One task per text, since a name may occur in several of them.
        templates, names = [template for template, _ in index_by_text], [[name] for _, name in index_by_text]
        tokens = class_tokens(towers.tokenizer, templates, names)
        tokens = tokens.to(towers.device)
        with torch.no_grad(), autocast(towers, config.clip.precision):
            features = torch.cat(tokens.pool_names_to_classes(towers.encode_text(tokens)))
        self.weights = nn.Parameter(features.to(torch.promote_types(features.dtype, torch.float32)))  # (C, E)

    def forward(self) -> Adaptation:
        return Adaptation(text_features=self._text_features)

    def _text_features(self, tokens: ClassTokens) -> torch.Tensor:
        return self.weights[self.weight_index_of_row[tokens.first_row :][: len(tokens.suffix)]]
