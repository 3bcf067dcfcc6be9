"""CLIP-LoRA (Zanella & Ben Ayed, CVPR-W 2024): W + (α / √r) B A for query, key and value of every layer of both towers.

Without dropout (the authors': 0.25 on the input of A). The authors use AdamW; SGD starts slowly from B = 0 and needs a
larger learning rate than for prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.config.fields import PositiveInt
from pipeline.lazy_torch import F, Module, nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, method
from pipeline.seeds import derive_seed

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("clip_lora")
class ClipLora(Method):
    title = "CLIP-LoRA"
    exports_weights = True

    class Options(MethodConfig):
        """CLIP-LoRA, and shared + task LoRA: low-rank updates of the attention matrices of both towers."""

        rank: PositiveInt = 2
        """Rank of the update of each query, key and value matrix."""
        alpha: Annotated[float, Field(gt=0)] = 1.0
        """The update is scaled by alpha / √rank."""
        training: TrainingOverrides = TrainingOverrides(
            epochs=250,
            batch_size=32,
            optimizer="adamw",
            learning_rate=2e-4,
            weight_decay=0.01,
            warmup_epochs=0,
            min_learning_rate=1e-6,
            schedule_interval="step",
        )

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        options = config.section(ClipLora.Options)
        self.towers = towers.trainable_copy()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "clip_lora"))
            for block in (*self.towers.vision_blocks, *self.towers.text_blocks):
                block.set_projection_update(LowRank(block.width, options.rank, options.alpha))

    def forward(self) -> Adaptation:
        return Adaptation(towers=self.towers)


class LowRank(Module):
    """Low-rank update of a layer's query, key and value. Not merged into the frozen matrices: in bfloat16 that would
    round small updates away, and its backward pass needs a gradient as large as the matrices."""

    def __init__(self, width: int, rank: int, alpha: float):
        super().__init__()
        self.scaling = alpha / rank**0.5
        self.down = nn.Linear(width, 3 * rank, bias=False)  # A (3r, D); Linear initializes as LoRA does
        self.up = nn.Parameter(torch.zeros(3, width, rank))  # B

    @staticmethod
    def weight_update(down: torch.Tensor, up: torch.Tensor, alpha: float) -> torch.Tensor:
        """Return what factors A (3r, D) and B (3, D, r) add to the three matrices (3, D, D): (α / √r) B A."""
        rank = up.shape[-1]
        update: torch.Tensor = alpha / rank**0.5 * up @ down.unflatten(0, (3, rank))
        return update

    def forward(self, h: torch.Tensor, parts: slice) -> torch.Tensor:
        """h (N, L, D) → (N, L, D · parts), where parts 0, 1, 2 are query, key and value."""
        return project_low_rank(h, parts, self.down.weight, self.up, self.scaling)


def project_low_rank(
    h: torch.Tensor, parts: slice, down: torch.Tensor, up: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Project h (N, L, D) by factors A (3r, D) and B (3, D, r) → (N, L, D · parts), as `LowRank`."""
    low = scaling * F.linear(h, down).unflatten(-1, (3, -1))[..., parts, :]
    return torch.einsum("nlpr,pdr->nlpd", low, up[parts]).flatten(-2)
