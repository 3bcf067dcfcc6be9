"""The frozen CLIP: loading by open_clip, and towers that take prompts and compute no more than the result needs."""
