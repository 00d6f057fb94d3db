"""Settings of evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.section import Section


class EvalConfig(Section):
    only: bool = False
    """Evaluate the checkpoint to resume from and do not train, as --eval does."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per rank and forward pass; null: data.batch_size."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width in pixels; null: data.image_size."""
    crop_mode: Literal["center", "squash"] = "center"
    """The central square of the image, or the whole of it with both sides resized to image_size (squash)."""
    crop_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the shorter side that the centre crop keeps: it is resized to round(image_size / crop_fraction)."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Which weights count: for best.pt, for predictions and exports; auto: the moving average where there is one."""
    tta: Literal["none", "flip", "flip-translate"] = "none"
    """Test-time augmentation: logits are means over the image and its mirror image (flip), and also over both shifted
    by a pixel up-left and down-right, which weigh half in all (flip-translate)."""
