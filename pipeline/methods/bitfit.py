"""BitFit (Zaken et al., ACL 2022): trains all biases of both towers, those of LayerNorms too."""

from __future__ import annotations

from pipeline.lazy_torch import nn
from pipeline.methods.method import MethodConfig, TrainingOverrides, WeightsMethod, method


@method("bitfit")
class BitFit(WeightsMethod):
    title = "BitFit"

    class Options(MethodConfig):
        """BitFit: the biases of both towers."""

        training: TrainingOverrides = TrainingOverrides(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01)

    @staticmethod
    def is_trained(module: nn.Module, name: str) -> bool:
        return name.endswith("bias")  # in_proj_bias too
