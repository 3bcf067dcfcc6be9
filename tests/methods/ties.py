from dataclasses import replace

from reference_merging import features_of_merged_weights, ties
from reference_method import Option

from methods import full_finetune

REFERENCE = replace(
    full_finetune.REFERENCE,
    features=features_of_merged_weights(ties),
    options={"density": Option(0.37), "scaling": Option(0.7)},
)
