"""Evaluation settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.section import Neutral, Resumable, Section


class EvalConfig(Section):
    """Evaluation on the validation split."""

    only: Neutral[bool] = False
    """Whether to evaluate the checkpoint given by resume instead of training; same as --eval."""
    batch_size: Resumable[int | None] = Field(default=None, ge=1)
    """Samples per rank and forward pass; null: data.batch_size."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width in pixels; null: data.image_size."""
    crop_mode: Literal["center", "squash"] = "center"
    """Central square of the image (center), or the whole image resized to image_size x image_size (squash)."""
    crop_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the shorter side kept by the center crop: the shorter side is resized to round(image_size /
    crop_fraction)."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Weights whose results select best.pt, also used for predictions and exports; auto: ema, the moving average, if
    there is one, otherwise raw."""
    best_by: Literal["top1", "loss", "top5"] = "top1"
    """Result of an evaluation that selects best.pt: the highest accuracy (top1, top5) or the lowest loss."""
    tta: Literal["none", "flip", "flip-translate"] = "none"
    """Test-time augmentation: average the logits of the image and its mirror image (flip), or also of both shifted by
    one pixel up-left and down-right, where the shifted images have half of the total weight (flip-translate)."""
