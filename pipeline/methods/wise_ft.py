"""WiSE-FT (Wortsman et al., CVPR 2022): the weights between the frozen CLIP's and the trained ones,
(1 - α) W⁰ + α W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config.fields import Fraction, Section
from pipeline.methods.merging import MergedLora, MergedWeights, TaskVector
from pipeline.methods.method import Variant, method

if TYPE_CHECKING:
    from pipeline.config import Config


class WiseFtConfig(Section, affects=("method",)):
    """WiSE-FT: trained weights mixed with the frozen CLIP's."""

    alpha: Fraction = 0.5
    """Weight of the trained weights; 0 is zero-shot CLIP. 0.5 is what the authors advise without other knowledge."""


def mix_with_frozen(config: Config, vectors: Sequence[TaskVector]) -> TaskVector:
    """Return the one task vector, scaled by α."""
    (vector,) = vectors
    alpha = config.section(WiseFtConfig).alpha
    return {name: alpha * value for name, value in vector.items()}


@method("wise_ft")
class WiseFt(MergedWeights):
    title = "WiSE-FT"
    Options = WiseFtConfig
    variants = {
        "wise_ft": Variant("WiSE-FT", "wise_ft", "single-task", init_from="full_finetune"),
        "wise_ft_mt": Variant("WiSE-FT-MT", "wise_ft", "multi-task", init_from="full_finetune_mt"),
    }
    combine = staticmethod(mix_with_frozen)


@method("wise_ft_lora")
class LoraWiseFt(MergedLora):
    title = "WiSE-FT of LoRA"
    Options = WiseFtConfig
    section = "wise_ft"
    variants = {
        "wise_ft_lora": Variant("WiSE-FT, LoRA", "wise_ft_lora", "single-task", init_from="clip_lora"),
        "wise_ft_lora_mt": Variant("WiSE-FT, LoRA-MT", "wise_ft_lora", "multi-task", init_from="clip_lora_mt"),
    }
    combine = staticmethod(mix_with_frozen)
