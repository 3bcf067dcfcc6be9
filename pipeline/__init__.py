"""Adapts a frozen CLIP to several related image-classification tasks with grouped MmAP prompts."""
