"""Hugging Face's CLIPModel in open_clip's terms: its weights, config.json and preprocessor_config.json.

Names and defaults are those of transformers' CLIPConfig, CLIPModel and CLIPImageProcessor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's number of a resampling filter → open_clip's name."""
TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"
"""Name by which the weights of a CLIPModel are recognized."""
_NAMES = {
    r"text_model\.embeddings\.token_embedding\.": "token_embedding.",
    r"text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"text_model\.final_layer_norm\.": "ln_final.",
    r"text_model\.encoder\.layers\.": "transformer.resblocks.",
    r"vision_model\.embeddings\.class_embedding": "visual.class_embedding",
    r"vision_model\.embeddings\.patch_embedding\.": "visual.conv1.",
    r"vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"vision_model\.pre_layrnorm\.": "visual.ln_pre.",  # misspelled there
    r"vision_model\.post_layernorm\.": "visual.ln_post.",
    r"vision_model\.encoder\.layers\.": "visual.transformer.resblocks.",
    r"(?<=\d\.)self_attn\.": "attn.",
    r"(?<=\d\.)layer_norm(?=[12]\.)": "ln_",
    r"(?<=\d\.mlp\.)fc1\.": "c_fc.",
    r"(?<=\d\.mlp\.)fc2\.": "c_proj.",
}
"""Part of a name in a CLIPModel → that of open_clip."""


def to_open_clip_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict of open_clip's CLIP of the state dict of a CLIPModel: query, key and value projections
    become one, the projections to features are transposed, the constants position_ids are left out.

    Raises:
        RuntimeError: the query, key and value of a layer have different widths.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _NAMES.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for name, projection in (("text_projection", "text_projection"), ("visual.proj", "visual_projection")):
        if f"{projection}.weight" in renamed:
            renamed[name] = renamed.pop(f"{projection}.weight").T
    for query in [name for name in renamed if ".attn.q_proj." in name]:
        names = [query.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(name in renamed for name in names):
            renamed[query.replace("q_proj.", "in_proj_")] = torch.cat([renamed.pop(name) for name in names])
    return {name: value for name, value in renamed.items() if not name.endswith("embeddings.position_ids")}


def to_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's model config of a CLIPConfig.

    Raises:
        ValueError: another kind of model, or one that open_clip's CLIP cannot express.
    """
    if (model_type := config.get("model_type")) != "clip":
        raise ValueError(f"its model_type is {model_type!r}, not 'clip'")
    text, vision = _section(config, "text", _TEXT_DEFAULTS), _section(config, "vision", _VISION_DEFAULTS)
    activations = {text["hidden_act"], vision["hidden_act"]}
    if activations not in ({"gelu"}, {"quick_gelu"}):
        raise ValueError(f"hidden_act is {' and '.join(sorted(activations))}; CLIP has gelu or quick_gelu in both")
    if vision["num_channels"] != 3:
        raise ValueError(f"its images have {vision['num_channels']} channels, not 3")
    if text["vocab_size"] != _TEXT_DEFAULTS["vocab_size"]:
        raise ValueError(f"its vocabulary has {text['vocab_size']:,} tokens; CLIP's tokenizer has 49,408")
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_sizes(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_sizes(text),
        },
    }


def to_preprocess_config(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's preprocess_cfg of a CLIPImageProcessor.

    Raises:
        ValueError: a preprocessing that open_clip's cannot express.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not processor.get(step, True):
            raise ValueError(f"{step} is false")
    if not math.isclose(factor := processor.get("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError(f"rescale_factor is {factor}, not 1/255")
    if (resample := processor.get("resample", 3)) not in _INTERPOLATIONS:
        raise ValueError(f"resample is {resample}; known: {_INTERPOLATIONS}")
    size, crop = processor.get("size", 224), processor.get("crop_size", 224)
    squashes = isinstance(size, Mapping) and "height" in size
    sides = {*_sides(size), *(_sides(crop) if processor.get("do_center_crop", True) else [])}
    if len(sides) != 1 or not (squashes or processor.get("do_center_crop", True)):
        raise ValueError(f"size {size} with crop_size {crop} does not give a whole square")
    return {
        "size": sides.pop(),
        "resize_mode": "squash" if squashes else "shortest",
        "interpolation": _INTERPOLATIONS[resample],
        **{name: processor[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in processor},
    }


def _section(config: Mapping[str, Any], tower: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a tower; `*_config_dict`, of older versions, takes precedence as in transformers."""
    return defaults | (config.get(f"{tower}_config_dict") or config.get(f"{tower}_config") or {})


def _sizes(tower: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that open_clip's vision_cfg and text_cfg have in common."""
    width, mlp_width = tower["hidden_size"], tower["intermediate_size"]
    ratio = mlp_width / width
    if int(width * ratio) != mlp_width:  # open_clip rounds down
        ratio = math.nextafter(ratio, math.inf)
    sizes = {"width": width, "layers": tower["num_hidden_layers"], "mlp_ratio": ratio}
    if (eps := tower["layer_norm_eps"]) != 1e-5:
        sizes["norm_kwargs"] = {"eps": eps}
    return sizes


def _sides(size: Any) -> list[int]:
    if not isinstance(size, Mapping):
        return [size]
    return [size[side] for side in ("shortest_edge", "height", "width") if side in size]
