"""Tip-Adapter-F (Zhang et al., ECCV 2022): Tip-Adapter with trained keys, initialized with the images' features."""

from __future__ import annotations

from pipeline.methods.method import MethodConfig, TrainingOverrides, method
from pipeline.methods.tip_adapter import TipAdapter


@method("tip_adapter_f")
class TipAdapterF(TipAdapter):
    title, section = "Tip-Adapter-F", "tip_adapter_f"
    takes_steps = True

    class Options(TipAdapter.Options, MethodConfig):
        """Tip-Adapter-F: a cache with trained keys."""

        training: TrainingOverrides = TrainingOverrides(
            epochs=20,
            batch_size=256,
            optimizer="adamw",
            learning_rate=0.001,
            weight_decay=0.01,
            warmup_epochs=0,
            schedule_interval="step",
        )
