"""Random resized crop and horizontal flip of a batch, on the device of its pixels. Random numbers are drawn at once;
torch resizes, with antialiasing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pipeline.config import AugmentationConfig
from pipeline.data.preprocessing import Preprocessing

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop; then a center crop


def crop_boxes(
    heights: torch.Tensor, widths: torch.Tensor, config: AugmentationConfig, generator: torch.Generator
) -> torch.Tensor:
    """Draw boxes (B, 4) int64 of (top, left, height, width) in images of `heights`, `widths` (B,) as torchvision's
    RandomResizedCrop: uniform area, log-uniform aspect ratio, uniform position; center crop if no attempt fits.
    """
    num_images = len(heights)
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
    preprocessing: Preprocessing,
    config: AugmentationConfig,
    generator: torch.Generator,
    shard: slice = slice(None),
) -> torch.Tensor:
    """Crop, resize and flip the uint8 `images` (3, h_i, w_i) of `training_pixels` → float32 (B, 3, S, S), 0-255.

    Random numbers come from a CPU `generator`, independent of the device, and are drawn for all images, independent of
    the `shard` that is returned.
    """
    device, size = images[0].device, preprocessing.image_size
    if config.random_crop:
        heights = torch.tensor([image.shape[1] for image in images])
        widths = torch.tensor([image.shape[2] for image in images])
        boxes = crop_boxes(heights, widths, config, generator)[shard]
        pixels = torch.empty(len(boxes), 3, size, size, device=device)
        for slot, image, (top, left, height, width) in zip(pixels, images[shard], boxes.tolist()):
            crop = image[None, :, top : top + height, left : left + width].float()
            slot[:] = F.interpolate(crop, size=size, mode=preprocessing.interpolation, antialias=True)[0]
        pixels.clamp_(0, 255)
    else:
        pixels = torch.stack(list(images[shard])).float()
    flipped = (torch.rand(len(images), generator=generator) < 0.5)[shard]
    if config.flip:
        pixels = torch.where(flipped.to(device)[:, None, None, None], pixels.flip(-1), pixels)
    return pixels
