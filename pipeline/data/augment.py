"""Random resized crop and horizontal flip of a batch, on the device of its pixels. Random numbers are drawn at once;
the resize is torch's bicubic with antialiasing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pipeline.config import AugmentationConfig

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop; then a center crop


def crop_boxes(
    heights: torch.Tensor, widths: torch.Tensor, config: AugmentationConfig, generator: torch.Generator
) -> torch.Tensor:
    """Draw boxes (B, 4) int64 of (top, left, height, width) in images of `heights`, `widths` (B,) as torchvision's
    RandomResizedCrop: uniform area, log-uniform aspect ratio, uniform position; center crop if no attempt fits.

    crop_scale (1, 1) gives the center square of the evaluation's preprocessing.
    """
    num_images = len(heights)
    short = torch.minimum(heights, widths)
    if tuple(config.crop_scale) == (1.0, 1.0):
        return torch.stack([(heights - short) // 2, (widths - short) // 2, short, short], dim=1)
    uniform = torch.rand(num_images, CROP_ATTEMPTS, 2, generator=generator, dtype=torch.float64)
    position = torch.rand(num_images, 2, generator=generator, dtype=torch.float64)
    low, high = config.crop_scale
    area = (heights * widths)[:, None] * (low + (high - low) * uniform[..., 0])
    ratio = torch.exp((2 * uniform[..., 1] - 1) * math.log(config.crop_ratio))
    box_w, box_h = torch.round(torch.sqrt(area * ratio)), torch.round(torch.sqrt(area / ratio))
    fits = (box_w >= 1) & (box_h >= 1) & (box_w <= widths[:, None]) & (box_h <= heights[:, None])
    first_fit = fits.int().argmax(dim=1, keepdim=True)
    any_fits = fits.any(dim=1)
    # The fallback keeps as much of the image as the ratio limits allow.
    fallback_w = torch.minimum(widths, torch.round(heights * config.crop_ratio).long())
    fallback_h = torch.minimum(heights, torch.round(widths * config.crop_ratio).long())
    box_w = torch.where(any_fits, box_w.gather(1, first_fit)[:, 0].long(), fallback_w)
    box_h = torch.where(any_fits, box_h.gather(1, first_fit)[:, 0].long(), fallback_h)
    room = torch.stack([heights - box_h, widths - box_w], dim=1)
    drawn = torch.floor(position * (room + 1)).long()
    corner = torch.where(any_fits[:, None], drawn, room // 2)
    return torch.cat([corner, box_h[:, None], box_w[:, None]], dim=1)


def augment(
    images: Sequence[torch.Tensor],
    image_size: int,
    config: AugmentationConfig,
    generator: torch.Generator,
    shard: slice = slice(None),
) -> torch.Tensor:
    """Crop, resize and flip uint8 `images` (3, h_i, w_i) → float32 (B, 3, image_size, image_size), 0-255.

    Random numbers come from a CPU `generator`, independent of the device, and are drawn for all images, independent of
    the `shard` that is returned.
    """
    device = images[0].device
    heights = torch.tensor([image.shape[1] for image in images])
    widths = torch.tensor([image.shape[2] for image in images])
    boxes = crop_boxes(heights, widths, config, generator)[shard]
    flipped = (torch.rand(len(images), generator=generator) < 0.5)[shard]
    pixels = torch.empty(len(boxes), 3, image_size, image_size, device=device)
    for slot, image, (top, left, height, width) in zip(pixels, images[shard], boxes.tolist()):
        crop = image[None, :, top : top + height, left : left + width].float()
        slot[:] = F.interpolate(crop, size=slot.shape[1:], mode="bicubic", antialias=True)[0]
    if config.flip:
        pixels = torch.where(flipped.to(device)[:, None, None, None], pixels.flip(-1), pixels)
    return pixels.clamp_(0, 255)
