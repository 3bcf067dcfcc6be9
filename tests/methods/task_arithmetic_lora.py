from reference_merging import MATRICES_OF_VIT_B_16, add, features_of_merged_lora
from reference_method import Option, Reference, is_all

REFERENCE = Reference(
    features=features_of_merged_lora(add),
    starts=lambda towers, model: {"*.in_proj_update.weight": is_all(0)},
    options={"scaling": Option(0.7)},
    num_parameters=(({}, MATRICES_OF_VIT_B_16),),
    trains_weight=lambda name: False,
)
