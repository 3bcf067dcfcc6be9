from dataclasses import replace

from reference_merging import features_of_merged_weights, mix
from reference_method import Option

from methods import full_finetune

REFERENCE = replace(
    full_finetune.REFERENCE,
    features=features_of_merged_weights(mix),
    options={"alpha": Option(0.3)},
)
