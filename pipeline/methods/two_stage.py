"""2SFS (Farina et al., CVPR 2025): a first stage trains the LayerNorms of both towers, a second stage a linear
classifier on the image features of these towers.

The classifier is initialized with the text features after the first stage, at unit length, and compared by cosine. Each
stage has its own schedule of the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config.fields import Fraction
from pipeline.lazy_torch import F, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.layernorm import LayerNorms
from pipeline.methods.linear_probe import LinearProbe
from pipeline.methods.method import ClassNames, MethodConfig, TrainingOverrides, method

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("two_stage")
class TwoStage(LinearProbe):
    title = "2SFS"
    section = "two_stage"
    trains_weights = True
    modifies_image_encoder = True

    class Options(MethodConfig):
        """2SFS: the LayerNorms of both towers, then a weight vector per class."""

        first_stage_fraction: Fraction = 0.6
        """Fraction of the steps that train the LayerNorms; the others train the classifier."""
        training: TrainingOverrides = TrainingOverrides(
            epochs=150,
            batch_size=32,
            optimizer="adamw",
            learning_rate=2e-4,
            weight_decay=0.01,
            warmup_epochs=0,
            min_learning_rate=1e-6,
            schedule_interval="step",
        )

    stage: torch.Tensor
    """Stage of the training, from 0; saved, since a trained method classifies as in the second stage."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__(config, towers, class_names)
        self.options = config.section(TwoStage.Options)
        self.towers = towers.trainable_copy(LayerNorms.is_trained)
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))

    @classmethod
    def needs_image_layers(cls) -> bool:
        return False

    def forward(self) -> Adaptation:
        if not self.stage:
            return Adaptation(towers=self.towers)
        return Adaptation(towers=self.towers, image_features=torch.Tensor.detach, text_features=self._text_features)

    def stage_steps(self, num_steps: int) -> Sequence[int]:
        num_layernorm_steps = int(num_steps * self.options.first_stage_fraction)
        return num_layernorm_steps, num_steps - num_layernorm_steps

    def start_stage(self, stage: int, class_features: Sequence[torch.Tensor]) -> None:
        """Initialize the classifier."""
        features = torch.cat(list(class_features))[self.class_of_weight].to(self.weights.dtype)
        with torch.no_grad():
            self.weights.copy_(F.normalize(features, dim=1))
        self.stage.fill_(stage)
