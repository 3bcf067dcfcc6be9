from dataclasses import replace

from methods import tip_adapter

REFERENCE = replace(
    tip_adapter.REFERENCE,
    logits=lambda method, x, z, clip_logits, config: tip_adapter.cache_logits(
        method, x, z, clip_logits, config.tip_adapter_f
    ),
    needs_small_learning_rate=True,
)
