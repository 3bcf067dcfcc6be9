from dataclasses import replace

from reference_merging import features_of_merged_lora, mix
from reference_method import Option

from methods import task_arithmetic_lora

REFERENCE = replace(
    task_arithmetic_lora.REFERENCE, features=features_of_merged_lora(mix), options={"alpha": Option(0.3)}
)
