"""LAMM (Gao et al., AAAI 2024): the first word pieces of each class name train; the template's words and images are
CLIP's own.

Held to the frozen CLIP at three levels: embeddings, text features, logits. Equal names share their embeddings, also
across tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.clip.class_tokens import ClassTokens
from pipeline.config.fields import NonNegative
from pipeline.data.names import split_synonyms
from pipeline.lazy_torch import F, nn, torch
from pipeline.methods.adaptation import Adaptation, Consistency
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config

TEMPERATURE = 2.0
"""Of both sides' logits where they are compared."""


@method("lamm")
class Lamm(Method):
    title = "LAMM"
    modifies_image_encoder = False
    uses_consistency = True

    class Options(MethodConfig):
        """LAMM: trained class names."""

        embedding_weight: NonNegative = 1.0
        """Weight of the squared distance of the trained embeddings from their start."""
        text_weight: NonNegative = 1.0
        """Weight of the cosine distance from the frozen text features."""
        logits_weight: NonNegative = 0.05
        """Weight of the divergence from the frozen CLIP's logits."""
        training: TrainingOverrides = TrainingOverrides(epochs=50, batch_size=32, learning_rate=0.002)

    start: torch.Tensor
    """CLIP's own `embeddings`."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.options = config.section(Lamm.Options)
        self._towers = (towers,)  # in a tuple, so that it is not a part of this module
        names = [name for of_task in class_names.values() for of_class in of_task for name in split_synonyms(of_class)]
        number = {name: at for at, name in enumerate(dict.fromkeys(names))}
        self.number_of_row = [number[name] for name in names]
        pieces = [towers.tokenizer.encode(name) for name in number]
        length = min(map(len, pieces))
        ids = torch.tensor([of_name[:length] for of_name in pieces], device=towers.device)
        start = towers.token_embedding(ids).detach()
        self.embeddings = nn.Parameter(start.clone())  # (names, k, d_l)
        self.register_buffer("start", start, persistent=False)

    def forward(self) -> Adaptation:
        distance = (self.embeddings - self.start).square().sum()
        return Adaptation(
            word_embeddings=self._with_trained_names,
            consistency=Consistency(self._of_images, self._of_texts, self.options.embedding_weight * distance),
        )

    def _with_trained_names(self, tokens: ClassTokens) -> torch.Tensor:
        (towers,) = self._towers
        suffix = towers.token_embedding(tokens.suffix)
        trained = self.embeddings[self.number_of_row[tokens.first_row :][: len(suffix)]]
        texts = zip(suffix.split(tokens.rows_per_task), trained.split(tokens.rows_per_task), tokens.name_start)
        return torch.cat([_with_names(of_task, names.to(suffix.dtype), at) for of_task, names, at in texts])

    def _of_images(
        self, x: torch.Tensor, frozen_x: torch.Tensor, logits: torch.Tensor, frozen_logits: torch.Tensor
    ) -> torch.Tensor:
        own, frozen = (F.log_softmax(of / TEMPERATURE, dim=1) for of in (logits, frozen_logits))
        divergence = F.kl_div(own, frozen, reduction="none", log_target=True).sum(1)
        return self.options.logits_weight * TEMPERATURE**2 * divergence

    def _of_texts(self, z: torch.Tensor, frozen_z: torch.Tensor) -> torch.Tensor:
        return self.options.text_weight * (1 - (z * frozen_z).sum(1))


def _with_names(suffix: torch.Tensor, names: torch.Tensor, at: int) -> torch.Tensor:
    """(C, S, D), of which (C, k, D) from `at` on are `names`."""
    return torch.cat([suffix[:, :at], names, suffix[:, at + names.shape[1] :]], dim=1)
