"""CLIP-Adapter (Gao et al., IJCV 2024): a bottleneck of two layers on the image feature, mixed with the feature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.fields import Fraction, PositiveInt
from pipeline.lazy_torch import nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, method
from pipeline.seeds import derive_seed

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("clip_adapter")
class ClipAdapter(Method):
    title = "CLIP-Adapter"
    modifies_image_encoder = False

    class Options(MethodConfig):
        """CLIP-Adapter: a bottleneck on image features."""

        reduction: PositiveInt = 4
        """Reduction factor of the bottleneck's width."""
        ratio: Fraction = 0.2
        """Weight of the bottleneck's output in the adapted feature."""
        training: TrainingOverrides = TrainingOverrides(epochs=50, batch_size=32, learning_rate=0.002)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        options, width = config.section(ClipAdapter.Options), towers.embed_dim
        self.ratio, hidden = options.ratio, width // options.reduction
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "clip_adapter"))
            self.bottleneck = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU())

    def forward(self) -> Adaptation:
        return Adaptation(image_features=self._mix)

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.ratio * self.bottleneck(x) + (1 - self.ratio) * x
        return mixed
