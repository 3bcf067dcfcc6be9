from reference_method import Option, Reference

from methods.tip_adapter import cache_logits, features, fit, is_empty

REFERENCE = Reference(
    features=features,
    fit=fit,
    logits=lambda method, x, z, clip_logits, config: cache_logits(method, x, z, clip_logits, config.tip_adapter_f),
    starts=lambda towers, model: {"keys": is_empty},
    options={"views": Option(3), "alpha": Option(2.5), "beta": Option(0.75)},
    small={"views": 2},
    modifies_text_encoder=False,
    random_start=False,
    needs_small_learning_rate=True,
)
