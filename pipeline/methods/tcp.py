"""TCP (Yao et al., CVPR 2024): a text context as CoOp's, which class-aware prompts replace before a later layer.

A bottleneck makes a class's prompts from the frozen CLIP's feature of its text. Text features are regularized towards
the frozen CLIP's. The context replaces the template's first tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.clip.class_tokens import ClassTokens
from pipeline.clip.precision import autocast
from pipeline.config.fields import NonNegative, PositiveInt
from pipeline.errors import UserError
from pipeline.lazy_torch import F, nn, torch
from pipeline.methods.adaptation import Adaptation, Consistency
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, method
from pipeline.methods.mvlpt import quick_gelu
from pipeline.seeds import derive_seed, normal

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("tcp")
class Tcp(Method):
    title = "TCP"
    modifies_image_encoder = False
    uses_consistency = True

    class Options(MethodConfig):
        """TCP: text context and class-aware prompts."""

        context_length: PositiveInt = 4
        """Context vectors, and class-aware prompts of a class. The context replaces the template's first tokens."""
        class_layer: PositiveInt = 9
        """Text layer, from 1, before which the class-aware prompts replace the context."""
        reduction: PositiveInt = 4
        """Reduction factor of the bottleneck's width."""
        text_weight: NonNegative = 8.0
        """Weight of the cosine distance from the frozen text features."""
        training: TrainingOverrides = TrainingOverrides(
            epochs=50, batch_size=32, optimizer="adamw", learning_rate=0.002
        )

    text_features: torch.Tensor
    """(R, E): the frozen CLIP's, of unit length."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        self.options = config.section(Tcp.Options)
        length, text_width, feature_width = self.options.context_length, towers.text_width, towers.embed_dim
        self.context = nn.Parameter(normal(length, text_width, std=0.02, seed=config.seed, purpose="tcp"))  # (b, d_l)
        hidden = feature_width // self.options.reduction
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "tcp bottleneck"))
            self.down, self.up = nn.Linear(feature_width, hidden), nn.Linear(hidden, length * text_width)
        tokens = Method.tokenize(config, towers.tokenizer, class_names).to(towers.device)
        with torch.no_grad(), autocast(towers, config.clip.precision):
            z = towers.encode_text(tokens)
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        self.register_buffer("text_features", z, persistent=False)

    def forward(self) -> Adaptation:
        return Adaptation(
            text_prompts=self.context.expand(len(self.tasks), 1, -1, -1),
            text_prompts_propagate=True,
            class_prompts=self._class_prompts,
            class_prompt_layer=self.options.class_layer - 1,
            consistency=Consistency(lambda x, *_: x.new_zeros(len(x)), self._text_loss),
        )

    def _class_prompts(self, tokens: ClassTokens) -> torch.Tensor:
        z = self.text_features[tokens.first_row :][: len(tokens.suffix)]
        prompts: torch.Tensor = self.up(quick_gelu(self.down(z))).unflatten(1, (len(self.context), -1))
        return prompts

    def _text_loss(self, z: torch.Tensor, frozen_z: torch.Tensor) -> torch.Tensor:
        return self.options.text_weight * (1 - (z * frozen_z).sum(1))

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(Tcp.Options).context_length

    num_replaced_tokens = num_prompt_positions

    @staticmethod
    def check(config: Config, towers: ClipTowers) -> None:
        """Raises: UserError: class_layer exceeds the layers of the text tower."""
        layer, depth = config.section(Tcp.Options).class_layer, towers.text_depth
        if layer > depth:
            raise UserError(f"tcp.class_layer={layer}: the text tower has {depth} layers; valid: 1 to {depth}")
