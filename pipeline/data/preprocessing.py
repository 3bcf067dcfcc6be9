"""Preprocessing of images for a CLIP, in open_clip's terms (its `PreprocessCfg`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pipeline.config import Channels, Interpolation, PositiveChannels, PositiveInt, ResizeMode

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images of any size to a CLIP's input; the defaults are OpenAI's."""

    image_size: PositiveInt
    """Side S of the square input."""
    resize_mode: ResizeMode = "shortest"
    """shortest: resize the shorter side to S and crop the center; longest: resize the longer side to S and pad; squash:
    resize both sides to S."""
    interpolation: Interpolation = "bicubic"
    mean: Channels = OPENAI_MEAN
    """Mean of standardization of R, G, B in [0, 1]."""
    std: PositiveChannels = OPENAI_STD
    """Standard deviation of standardization."""
    fill_color: Annotated[int, Field(ge=0, le=255)] = 0
    """R, G and B of the padding of `longest`."""
    jpeg_draft: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size, with sides of at least twice the size to resize to."""
