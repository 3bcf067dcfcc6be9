"""Families of towers: which one a model's towers belong to."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.clip.families.base import ImageTower, TextTower, UnsupportedTower
from pipeline.clip.families.black_box import BlackBox
from pipeline.clip.families.hugging_face_bert import HuggingFaceBert
from pipeline.clip.families.open_clip_towers import FlatText, OpenClipImageTower, OpenClipTextTower
from pipeline.clip.families.timm_eva import Eva
from pipeline.clip.families.timm_vit import TimmVisionTransformer

COCA = "CoCa's towers also return the tokens of its captions"


def describe_image_tower(visual: Any) -> ImageTower:
    """Return the description of an image tower, that of a black box if its layers cannot take prompts."""
    families: dict[str, type[TimmVisionTransformer | OpenClipImageTower]]
    if hasattr(visual, "trunk"):
        name, families = type(visual.trunk).__name__, {"VisionTransformer": TimmVisionTransformer, "Eva": Eva}
    else:
        name, families = type(visual).__name__, {"VisionTransformer": OpenClipImageTower}
    if name not in families:
        return BlackBox(f"{name} has no tokens that pass through all layers")
    try:
        return families[name](visual)
    except UnsupportedTower as error:
        return BlackBox(str(error))


def describe_text_tower(model: Any) -> tuple[nn.Module, TextTower]:
    """Return the module of a CLIP's text tower, and its description.

    Raises:
        UnsupportedTower: the reason why it cannot be used.
    """
    if type(model).__name__ == "CoCa":
        raise UnsupportedTower(COCA)
    if not hasattr(model, "text"):
        text = FlatText(model)
        return text, OpenClipTextTower(text, model)
    if hasattr(model.text, "token_embedding"):
        return model.text, OpenClipTextTower(model.text, model.text)
    if type(model.text).__name__ == "HFTextEncoder":
        return model.text, HuggingFaceBert(model.text)
    raise UnsupportedTower(f"the text tower is a {type(model.text).__name__}, of which nothing is known")
