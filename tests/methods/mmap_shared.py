"""MmAP shared by all tasks: its group's prompts alone."""

from dataclasses import replace

from reference_method import is_all, is_normal

from methods import mmap

REFERENCE = replace(
    mmap.REFERENCE,
    features=lambda method, *others: mmap.features_of((method.mmap,), *others),
    starts=lambda towers, model: {"mmap.source": is_normal(0.07), "mmap.*_scaling": is_all(1)},
)
