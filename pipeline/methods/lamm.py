"""LAMM (Gao et al., AAAI 2024): trains the embeddings of the first subwords of each class name.

Regularized towards the frozen CLIP at three levels: embeddings, text features, logits. Equal names share their
embeddings, also across tasks.
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
"""Temperature of both logits in the divergence."""


@method("lamm")
class Lamm(Method):
    title = "LAMM"
    modifies_image_encoder = False
    uses_consistency = True
    takes_several_labels = False  # its loss compares softmax probabilities

    class Options(MethodConfig):
        """LAMM: trained class names."""

        embedding_weight: NonNegative = 1.0
        """Weight of the squared distance of the trained embeddings from CLIP's."""
        text_weight: NonNegative = 1.0
        """Weight of the cosine distance from the frozen text features."""
        logits_weight: NonNegative = 0.05
        """Weight of the divergence from the frozen CLIP's logits."""
        training: TrainingOverrides = TrainingOverrides(epochs=50, batch_size=32, learning_rate=0.002)

    initial_embeddings: torch.Tensor
    """CLIP's values of `embeddings`."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.options = config.section(Lamm.Options)
        self._towers = (towers,)  # in a tuple, so that it is not a submodule
        class_texts = [text for task_texts in class_names.values() for text in task_texts]
        names = [name for text in class_texts for name in split_synonyms(text)]
        index_by_name = {name: index for index, name in enumerate(dict.fromkeys(names))}
        self.name_index_of_row = [index_by_name[name] for name in names]
        subwords = [towers.tokenizer.encode_name(name) for name in index_by_name]
        length = min(map(len, subwords))
        ids = torch.tensor([name_ids[:length] for name_ids in subwords], device=towers.device)
        embeddings = towers.token_embedding(ids).detach()
        self.embeddings = nn.Parameter(embeddings.clone())  # (names, k, d_l)
        self.register_buffer("initial_embeddings", embeddings, persistent=False)

    def forward(self) -> Adaptation:
        distance = (self.embeddings - self.initial_embeddings).square().sum()
        return Adaptation(
            word_embeddings=self._word_embeddings,
            consistency=Consistency(self._image_loss, self._text_loss, self.options.embedding_weight * distance),
        )

    def _word_embeddings(self, tokens: ClassTokens) -> torch.Tensor:
        (towers,) = self._towers
        suffix = towers.token_embedding(tokens.suffix)
        trained = self.embeddings[self.name_index_of_row[tokens.first_row :][: len(suffix)]]
        texts = zip(suffix.split(tokens.rows_per_task), trained.split(tokens.rows_per_task), tokens.name_start)
        return torch.cat(
            [_insert_names(task_suffix, names.to(suffix.dtype), start) for task_suffix, names, start in texts]
        )

    def _image_loss(
        self, x: torch.Tensor, frozen_x: torch.Tensor, logits: torch.Tensor, frozen_logits: torch.Tensor
    ) -> torch.Tensor:
        log_p, frozen_log_p = (F.log_softmax(values / TEMPERATURE, dim=1) for values in (logits, frozen_logits))
        divergence = F.kl_div(log_p, frozen_log_p, reduction="none", log_target=True).sum(1)
        return self.options.logits_weight * TEMPERATURE**2 * divergence

    def _text_loss(self, z: torch.Tensor, frozen_z: torch.Tensor) -> torch.Tensor:
        return self.options.text_weight * (1 - (z * frozen_z).sum(1))


def _insert_names(suffix: torch.Tensor, names: torch.Tensor, start: int) -> torch.Tensor:
    """Replace suffix (C, S, D) from position `start` by names (C, k, D)."""
    return torch.cat([suffix[:, :start], names, suffix[:, start + names.shape[1] :]], dim=1)
