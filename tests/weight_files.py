"""The forms in which people have a CLIP's weights, written from one small random model."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.clip.torchvision_compat import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402

State = dict[str, torch.Tensor]
LAYERS, WIDTH, TEXT_WIDTH, EMBED = 2, 32, 16, 24
CONFIG: dict[str, Any] = {
    "embed_dim": EMBED,
    "vision_cfg": {"image_size": 16, "layers": LAYERS, "width": WIDTH, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": TEXT_WIDTH, "heads": 1, "layers": LAYERS},
}
"""open_clip's model config."""
QUICK = CONFIG | {"quick_gelu": True}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def random_state() -> State:
    """Return a state dict of open_clip's CLIP with values that float16 and bfloat16 represent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = open_clip.CLIP(**CONFIG).state_dict()
        return {name: torch.randint_like(value, -128, 128) / 256 for name, value in state.items()}


def with_text_tower(state: State) -> State:
    """The names of open_clip's CustomTextCLIP."""
    outside = ("visual.", "logit_scale")
    return {name if name.startswith(outside) else f"text.{name}": value for name, value in state.items()}


# --- OpenAI --------------------------------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 1)
        self.ln_1 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.resblocks = nn.Sequential(*[Block(width) for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty(5, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Transformer(WIDTH)
        self.proj = nn.Parameter(torch.empty(WIDTH, EMBED))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv1(images).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.class_embedding.expand(1, x.shape[1], -1), x]) + self.positional_embedding[:, None]
        return self.ln_post(self.transformer(self.ln_pre(x))[0]) @ self.proj


class OpenaiClip(nn.Module):
    """The modules of OpenAI's CLIP, with the three numbers that its archives have as buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.transformer = Transformer(TEXT_WIDTH)
        self.token_embedding = nn.Embedding(49408, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.empty(77, TEXT_WIDTH))
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.empty(TEXT_WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.empty([]))
        for name, number in NUMBERS.items():
            self.register_buffer(name, torch.tensor(number))
        self.pair, self.triple, self.names = (2, 2), (1, 2, 3), ["a", "b"]  # attributes that are no weights

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = (self.token_embedding(text) + self.positional_embedding).permute(1, 0, 2)
        z = self.ln_final(self.transformer(x)[-1]) @ self.text_projection
        return self.logit_scale.exp() * self.visual(images) @ z.T


NUMBERS = {"input_resolution": 16, "context_length": 77, "vocab_size": 49408}


def openai_state(state: State) -> State:
    """The state dict of OpenAI's archive, which has float16 matrices."""
    return {name: value.half() for name, value in state.items()} | {
        name: torch.tensor(number) for name, number in NUMBERS.items()
    }


def openai_archive(file: Path, state: State, trace: bool = False) -> None:
    """An archive as torch.jit.save writes it: compressed code, plain tensors."""
    model = OpenaiClip().eval()
    model.load_state_dict(openai_state(state))
    inputs = torch.zeros(1, 3, 16, 16), torch.zeros(1, 77, dtype=torch.long)
    torch.jit.save(torch.jit.trace(model, inputs) if trace else torch.jit.script(model.half()), file)


def other_archive(file: Path, state: State, activation: nn.Module) -> None:
    """An archive of others, without the three numbers."""
    model = OpenaiClip().eval()
    model.load_state_dict(openai_state(state))
    for name in NUMBERS:
        delattr(model, name)
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
        block.mlp.gelu = activation
    torch.jit.save(torch.jit.script(model), file)


# --- Hugging Face --------------------------------------------------------------------------------------------------


def hugging_face_state(state: State) -> State:
    """The state dict of transformers' CLIPModel, by the names of its modules."""
    text, vision = "text_model", "vision_model"
    named = {
        "logit_scale": state["logit_scale"],
        f"{text}.embeddings.token_embedding.weight": state["token_embedding.weight"],
        f"{text}.embeddings.position_embedding.weight": state["positional_embedding"],
        f"{text}.embeddings.position_ids": torch.arange(77)[None],
        f"{text}.final_layer_norm.weight": state["ln_final.weight"],
        f"{text}.final_layer_norm.bias": state["ln_final.bias"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
        f"{vision}.embeddings.class_embedding": state["visual.class_embedding"],
        f"{vision}.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        f"{vision}.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        f"{vision}.embeddings.position_ids": torch.arange(5)[None],
        f"{vision}.pre_layrnorm.weight": state["visual.ln_pre.weight"],
        f"{vision}.pre_layrnorm.bias": state["visual.ln_pre.bias"],
        f"{vision}.post_layernorm.weight": state["visual.ln_post.weight"],
        f"{vision}.post_layernorm.bias": state["visual.ln_post.bias"],
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
    }
    for tower, blocks in ((text, "transformer.resblocks"), (vision, "visual.transformer.resblocks")):
        for layer in range(LAYERS):
            ours, theirs = f"{blocks}.{layer}", f"{tower}.encoder.layers.{layer}"
            for kind in ("weight", "bias"):
                query, key, value = state[f"{ours}.attn.in_proj_{kind}"].chunk(3)
                named[f"{theirs}.self_attn.k_proj.{kind}"] = key
                named[f"{theirs}.self_attn.v_proj.{kind}"] = value
                named[f"{theirs}.self_attn.q_proj.{kind}"] = query
                named[f"{theirs}.self_attn.out_proj.{kind}"] = state[f"{ours}.attn.out_proj.{kind}"]
                named[f"{theirs}.layer_norm1.{kind}"] = state[f"{ours}.ln_1.{kind}"]
                named[f"{theirs}.mlp.fc1.{kind}"] = state[f"{ours}.mlp.c_fc.{kind}"]
                named[f"{theirs}.mlp.fc2.{kind}"] = state[f"{ours}.mlp.c_proj.{kind}"]
                named[f"{theirs}.layer_norm2.{kind}"] = state[f"{ours}.ln_2.{kind}"]
    return {name: value.clone() for name, value in named.items()}


HUGGING_FACE_CONFIG: dict[str, Any] = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": EMBED,
    "text_config": {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": LAYERS,
    },
    "vision_config": {
        "hidden_size": WIDTH,
        "image_size": 16,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": LAYERS,
        "patch_size": 8,
    },
}
"""The other fields have the defaults of transformers, among them quick_gelu."""
PROCESSOR = {
    "crop_size": {"height": 16, "width": 16},
    "do_center_crop": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 2,
    "size": {"shortest_edge": 16},
}


def sharded(folder: Path, state: State, save: Callable[[State, Path], None], name: str, suffix: str) -> None:
    """A model in two files, and the index of the tensors in each."""
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"{name}-0000{number}-of-00002{suffix}"
        save({key: state[key] for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{name}{suffix}.index.json").write_text(json.dumps(index))


def hugging_face_folder(folder: Path, state: State, config: dict[str, Any] = HUGGING_FACE_CONFIG) -> Path:
    folder.mkdir(parents=True)
    save_file(hugging_face_state(state), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def open_clip_folder(folder: Path, state: State, config: dict[str, Any] = QUICK) -> Path:
    """A snapshot of a repository that open_clip's push_to_hf_hub made."""
    folder.mkdir(parents=True)
    save_file(state, folder / "open_clip_model.safetensors")
    values = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    return folder


def hub_cache(cache: Path, repository: str, write: Callable[[Path], Path]) -> None:
    """A repository in the cache of huggingface_hub, as `hf download` leaves it: links to blobs."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = write(folder / "snapshots" / COMMIT)
    (folder / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = folder / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
