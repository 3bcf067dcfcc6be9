"""MmAP shared by all tasks: only the group's prompts."""

from dataclasses import replace

from reference_method import is_all, is_normal

from methods import mmap

REFERENCE = replace(
    mmap.REFERENCE,
    features=lambda method, *inputs: mmap.features_of((method.mmap,), *inputs),
    starts=lambda towers, model: {"mmap.source": is_normal(0.07), "mmap.*_scaling": is_all(1)},
)
