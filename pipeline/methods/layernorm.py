"""LN-tuning (Qi et al., 2022; with few images Basu et al., AAAI 2024): trains weights and biases of all
LayerNorms of both towers.

No published learning rate is for CLIP: AdamW at 0.001, as for BitFit.
"""

from __future__ import annotations

from pipeline.lazy_torch import nn
from pipeline.methods.method import MethodConfig, TrainingOverrides, WeightsMethod, method


@method("layernorm")
class LayerNorms(WeightsMethod):
    title = "LN-tuning"

    class Options(MethodConfig):
        """LN-tuning: the LayerNorms of both towers."""

        training: TrainingOverrides = TrainingOverrides(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01)

    @staticmethod
    def is_trained(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.LayerNorm)
