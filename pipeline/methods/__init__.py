"""Parameter-efficient tuning methods, one file each."""

import pipeline.config  # noqa: F401  # before the methods, which it imports and which import its parts
