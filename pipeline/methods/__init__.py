"""Parameter-efficient tuning methods, one file each."""

import pipeline.config  # noqa: F401  # first, since its sections are those of the methods, which import its parts
