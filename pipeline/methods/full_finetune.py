"""Full fine-tuning: all weights of both towers train, and the temperature of the logits.

It wants a far smaller rate than prompts do: training.learning_rate of 1e-5 or so.
"""

from __future__ import annotations

from pipeline.methods.method import MethodConfig, TrainingOverrides, WeightsMethod, method


@method("full_finetune")
class FullFineTuning(WeightsMethod):
    title = "full fine-tuning"

    class Options(MethodConfig):
        """Full fine-tuning."""

        training: TrainingOverrides = TrainingOverrides(optimizer="adamw", learning_rate=1e-5, weight_decay=0.1)

    @staticmethod
    def is_trained(name: str) -> bool:
        return True
