from dataclasses import replace

from reference_merging import add, features_of_merged_weights
from reference_method import Option

from methods import full_finetune

REFERENCE = replace(
    full_finetune.REFERENCE,
    features=features_of_merged_weights(add),
    options={"scaling": Option(0.7)},
)
