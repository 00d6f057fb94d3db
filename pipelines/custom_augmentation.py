"""Apply the user's own augmentation (aug.custom) to batches on their device, after the loader's own transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from configs.utils.code import describe_error, load_object
from configs.utils.errors import UserError
from pipelines.interfaces import Position
from pipelines.rng import hash64, stream


class CustomAugmentation:
    """Calls the user's function (images, generator) -> images with a generator seeded for each batch.

    The seed is a function of (seed, epoch, batch, rank), so a resumed run draws the same numbers as an uninterrupted
    run, and runs with other numbers of ranks draw other numbers.

    Args:
        reference: The value of aug.custom.
        seed: Seed of the run.
        rank: Rank of this process.
        device: Device of the batches.

    Raises:
        UserError: The code cannot be imported, or is a class.
    """

    def __init__(self, reference: str, seed: int, rank: int, device: torch.device) -> None:
        self._reference, self._seed, self._rank = reference, seed, rank
        self._function: Callable[..., object] = load_object(reference, "aug.custom")
        if isinstance(self._function, type):
            raise UserError(
                f"aug.custom={reference} is a class, but must be a function (images, generator) -> images; call an "
                "object of the class in a function of your own and name that function, as path/to/file.py:NAME"
            )
        self._is_range_checked = False
        self._generator = torch.Generator(device)

    def __call__(self, images: torch.Tensor, position: Position) -> torch.Tensor:
        """Return the augmented images, uint8 [B, 3, H, W] with channels_last strides.

        Args:
            images: uint8 [B, 3, H, W] with channels_last strides. The function may change them in place.
            position: Epoch, and number of the batch in the epoch on this rank.

        Raises:
            UserError: The function fails, or returns something else than images of the same shape on the same device.
        """
        key = stream(self._seed, position.epoch, f"custom-{self._rank}")
        self._generator.manual_seed(int(hash64(np.array([position.step], np.uint64) ^ key)[0] >> np.uint64(1)))
        with torch.no_grad():
            brightest = None if self._is_range_checked else images.amax()  # the function may change the images
            try:
                result = self._function(images, self._generator)
            except (UserError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the user's code may raise anything
                raise UserError(f"aug.custom={self._reference} failed: {describe_error(error)}") from error
            if not isinstance(result, torch.Tensor) or result.shape != images.shape or result.device != images.device:
                raise self._refused(result, images)
            if brightest is not None and brightest > 1:  # synchronizes, so only until a batch is not black
                self._is_range_checked = True
                if result.is_floating_point() and result.amax() <= 1:
                    raise UserError(
                        f"aug.custom={self._reference} returns floats from 0 to 1, but must return 0 to 255; multiply "
                        "the result by 255"
                    )
            if result.is_floating_point():
                result = result.round().clamp(0, 255).to(torch.uint8)
            elif result.dtype != torch.uint8:
                raise self._refused(result, images)
            return result.contiguous(memory_format=torch.channels_last)

    def _refused(self, result: object, images: torch.Tensor) -> UserError:
        found = type(result).__name__
        if isinstance(result, torch.Tensor):
            found = f"{result.dtype} {list(result.shape)} on {result.device}"
        return UserError(
            f"aug.custom={self._reference} returns {found}, but must return images as it gets them, uint8 "
            f"{list(images.shape)} on {images.device}, or floats from 0 to 255 of this shape"
        )


class CustomViews:
    """Calls the user's function once for each view of a batch, as a loader with this view alone would.

    Args:
        functions: The function of each view.
    """

    def __init__(self, functions: Sequence[CustomAugmentation]) -> None:
        self._functions = functions

    def __call__(self, images: torch.Tensor, position: Position) -> torch.Tensor:
        """Return the augmented images, uint8 [B * views, 3, H, W], in the memory of `images`."""
        for view, function in enumerate(self._functions):
            part = images[view :: len(self._functions)]
            part.copy_(function(part.contiguous(memory_format=torch.channels_last), position))
        return images


def build_custom(
    reference: str | None, seeds: Sequence[int], rank: int, device: torch.device
) -> Callable[[torch.Tensor, Position], torch.Tensor] | None:
    """Return the augmentation aug.custom of batches whose views have these seeds of draws, or None if it is not set.

    See `CustomAugmentation` for the other arguments, and for errors.
    """
    if reference is None:
        return None
    functions = [CustomAugmentation(reference, seed, rank, device) for seed in seeds]
    return functions[0] if len(functions) == 1 else CustomViews(functions)
