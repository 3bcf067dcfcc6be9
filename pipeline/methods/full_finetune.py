"""Full fine-tuning: trains all weights of both towers, and the temperature of the logits.

It needs a far smaller learning rate than prompts: about 1e-5.
"""

from __future__ import annotations

from pipeline.lazy_torch import nn
from pipeline.methods.method import MethodConfig, TrainingOverrides, WeightsMethod, method


@method("full_finetune")
class FullFineTuning(WeightsMethod):
    title = "full fine-tuning"

    class Options(MethodConfig):
        """Full fine-tuning."""

        training: TrainingOverrides = TrainingOverrides(optimizer="adamw", learning_rate=1e-5, weight_decay=0.1)

    @staticmethod
    def is_trained(module: nn.Module, name: str) -> bool:
        return True
