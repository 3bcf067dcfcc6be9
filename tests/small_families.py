"""Small models of each family of image towers, with random weights, and the plain definition of their prompts."""

from __future__ import annotations

import copy
from functools import cache, partial
from unittest import mock

import small_clip  # noqa: F401  declares operators that torchvision may lack
import timm
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from small_clip import small_open_clip

TIMM_MODELS = {
    "ViT with CLS": ("vit_large_patch14_clip_224", "token", None, {}),
    "ViT with conv stem": (
        "vit_base_mci_224",
        "token",
        None,
        {"embed_dim": 768, "num_heads": 12, "patch_size": 1, "img_size": 32},
    ),
    "ViT with mean": ("vit_medium_patch16_gap_256", "", "linear", {}),
    "SigLIP": ("vit_base_patch16_siglip_224", "map", "none", {}),
    "ViTamin": ("vitamin_small_224", "", "linear", {"embed_dim": 384, "patch_size": 1, "img_size": 32}),
    "EVA01": ("eva_giant_patch14_clip_224", "token", None, {}),
    "EVA02": ("eva02_base_patch16_clip_224", "token", None, {"ref_feat_shape": (3, 3)}),
    "EVA02, post-norm": ("eva02_enormous_patch14_clip_224", "token", None, {}),
    "PE": ("vit_pe_core_base_patch16_224", "map", None, {"attn_pool_num_heads": 2, "ref_feat_shape": (3, 3)}),
}
"""Family → timm's name, pooling, projection, and sizes that differ."""
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
FAMILIES = (*TIMM_MODELS, "CLIPA")


def small_model(family: str, **sizes: int) -> torch.nn.Module:
    """Return a copy of a random CLIP in float64 with an image tower of this family, of 3 layers of width 24."""
    return copy.deepcopy(_random_model(family, **sizes))


@cache
def _random_model(family: str, **other_sizes: int) -> torch.nn.Module:
    text = CLIPTextCfg(context_length=77, vocab_size=49408, width=16, heads=2, layers=2)
    if family in TIMM_MODELS:
        name, pool, proj, sizes = TIMM_MODELS[family]
        sizes = SIZES | sizes | other_sizes
        vision = CLIPVisionCfg(
            timm_model_name=name,
            timm_model_pretrained=False,
            timm_pool=pool,
            timm_proj=proj,
            image_size=sizes["img_size"],
        )
        create = mock.patch.object(timm, "create_model", partial(timm.create_model, **sizes))
    else:
        sizes = SIZES | other_sizes
        vision = CLIPVisionCfg(
            layers=sizes["depth"],
            width=sizes["embed_dim"],
            head_width=8,
            patch_size=8,
            image_size=16,
            no_ln_pre=True,
            pool_type="avg",
            final_ln_after_pool=True,
        )
        create = mock.patch.object(timm, "create_model", timm.create_model)
    with torch.random.fork_rng(devices=[]), create:
        torch.manual_seed(0)
        model = CustomTextCLIP(embed_dim=sizes["embed_dim"], vision_cfg=vision, text_cfg=text).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("logit"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def black_box() -> torch.nn.Module:
    """Return a random CLIP with a ResNet, which has no tokens."""
    model = small_open_clip(custom_text=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.visual = ModifiedResNet((1, 1, 1, 1), output_dim=12, heads=2, image_size=64, width=8).double()
    return model.eval()


def reference_features(
    model: torch.nn.Module, images: torch.Tensor, prompts: torch.Tensor, propagate: bool
) -> torch.Tensor:
    """images (B, 3, H, W), prompts (K', b, D) → (B, E): [CLS, prompts, patches] at each layer, by the tower's own
    blocks; their outputs are discarded, or those of layer K' stay (propagate)."""
    visual = model.visual
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        x, blocks, num_prefix, rope, norm_pre = (
            visual._embeds(images),
            visual.transformer.resblocks,
            1,
            {},
            visual.ln_pre,
        )
    else:
        x, rope = trunk._pos_embed(trunk.patch_embed(images)), {}
        if isinstance(x, tuple):
            x, rotation = x
            rope = {"rope": rotation}
        x, blocks, num_prefix, norm_pre = trunk.norm_pre(x), trunk.blocks, trunk.num_prefix_tokens, trunk.norm_pre
    if propagate:
        prompts = torch.cat([norm_pre(prompts[:1]), prompts[1:]])
    b = prompts.shape[1]
    inserted = 0
    for k, block in enumerate(blocks):
        if k < len(prompts):
            x = torch.cat([x[:, :num_prefix], prompts[k].expand(len(x), -1, -1), x[:, num_prefix + inserted :]], dim=1)
            inserted = b
        if hasattr(block.attn, "num_prefix_tokens"):
            block.attn.num_prefix_tokens = num_prefix + inserted  # neither these nor the prompts are rotated
        x = block(x, **rope)
        if not (propagate and k >= len(prompts) - 1):
            x, inserted = torch.cat([x[:, :num_prefix], x[:, num_prefix + inserted :]], dim=1), 0
    x = torch.cat([x[:, :num_prefix], x[:, num_prefix + inserted :]], dim=1)
    if trunk is None:
        return visual._pool(x)[0] @ visual.proj
    return visual.head(trunk.forward_head(trunk.norm(x)))
