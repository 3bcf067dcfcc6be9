"""PromptSRC (Khattak et al., ICCV 2023): independent prompts of the first layers of both towers, regularized
towards the features and logits of the frozen CLIP.

Prompts propagate as MaPLe's, and those of the first text layer replace the template's first tokens as MaPLe's. A
training ends with a Gaussian average of the prompts over its epochs. The frozen text features are of one template.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.fields import NonNegative, PositiveInt
from pipeline.errors import UserError
from pipeline.lazy_torch import F, nn, torch
from pipeline.methods.adaptation import Adaptation, Consistency
from pipeline.methods.maple import initial_context
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, method
from pipeline.seeds import normal

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("promptsrc")
class PromptSrc(Method):
    title = "PromptSRC"
    uses_consistency = True
    takes_several_labels = False  # its loss compares softmax probabilities

    class Options(MethodConfig):
        """PromptSRC: prompts of both towers, regularized towards the frozen CLIP."""

        prompt_length: PositiveInt = 4
        """Prompt vectors per layer. The first text layer's replace the template's first tokens and are initialized with
        them, or at random if it has fewer before the class name."""
        depth: PositiveInt = 9
        """Number of first layers with new prompts."""
        image_weight: NonNegative = 10.0
        """Weight of the mean absolute distance from the frozen image features."""
        text_weight: NonNegative = 25.0
        """Weight of the mean absolute distance from the frozen text features."""
        logits_weight: NonNegative = 1.0
        """Weight of the divergence from the frozen CLIP's logits."""
        training: TrainingOverrides = TrainingOverrides(epochs=50, batch_size=4, learning_rate=0.0025)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        self.options = config.section(PromptSrc.Options)
        depth, length = self.options.depth, self.options.prompt_length
        text, vision = (
            normal(depth, length, width, std=0.02, seed=config.seed, purpose=f"promptsrc {tower}")
            for tower, width in (("text", towers.text_width), ("vision", towers.vision_width))
        )
        text[0] = initial_context(config, towers, self.tasks, text[0])
        self.text_prompts = nn.Parameter(text)  # (K', b, d_l)
        self.vision_prompts = nn.Parameter(vision)  # (K', b, d_v)

    def forward(self) -> Adaptation:
        text, vision = (p.expand(len(self.tasks), -1, -1, -1) for p in (self.text_prompts, self.vision_prompts))
        consistency = Consistency(self._image_loss, self._text_loss)
        return Adaptation(
            text, vision, text_prompts_propagate=True, vision_prompts_propagate=True, consistency=consistency
        )

    def _image_loss(
        self, x: torch.Tensor, frozen_x: torch.Tensor, logits: torch.Tensor, frozen_logits: torch.Tensor
    ) -> torch.Tensor:
        log_p, frozen_log_p = (F.log_softmax(values, dim=1) for values in (logits, frozen_logits))
        divergence = F.kl_div(log_p, frozen_log_p, reduction="none", log_target=True).mean(1)
        return self.options.image_weight * (x - frozen_x).abs().mean(1) + self.options.logits_weight * divergence

    def _text_loss(self, z: torch.Tensor, frozen_z: torch.Tensor) -> torch.Tensor:
        return self.options.text_weight * (z - frozen_z).abs().mean(1)

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(PromptSrc.Options).prompt_length

    num_replaced_tokens = num_prompt_positions

    @staticmethod
    def epoch_weights(epochs: int) -> list[float]:
        """Return the authors' Gaussian of mean 30 and standard deviation 30 of 50 epochs, for any number of epochs."""
        time = torch.arange(1, epochs + 1, dtype=torch.float64) / epochs
        weights: list[float] = (-(((time - 0.6) / 0.6) ** 2) / 2).softmax(0).tolist()
        return weights

    @staticmethod
    def check(config: Config, towers: ClipTowers) -> None:
        """Raises: UserError: depth exceeds the layers of a tower."""
        depth, deepest = config.section(PromptSrc.Options).depth, min(towers.text_depth, towers.vision_depth)
        if depth > deepest:
            raise UserError(f"promptsrc.depth={depth}: the shallower tower has {deepest} layers; valid: 1 to {deepest}")
