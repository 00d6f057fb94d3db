"""What is done to gradients before the optimizer sees them. Nothing here waits for the device."""

from __future__ import annotations

from torch import nn

from configs.schema import TrainConfig


def clips_gradients(config: TrainConfig) -> bool:
    return (config.clip_grad_norm, config.clip_grad_value, config.clip_grad_adaptive) != (None, None, None)


def clip_gradients(network: nn.Module, config: TrainConfig) -> None:
    """By the norm of all, by value, or adaptively (AGC, Brock and others, arXiv:2102.06171): one of them at most.

    AGC leaves out the last linear layer, as its authors do.
    """
    if config.clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad_norm)
    elif config.clip_grad_value is not None:
        nn.utils.clip_grad_value_(network.parameters(), config.clip_grad_value)
    elif config.clip_grad_adaptive is not None:
        from timm.utils.agc import adaptive_clip_grad  # seconds, which most runs do without

        head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]
        left_out = {id(parameter) for module in head for parameter in module.parameters()}
        clipped = [parameter for parameter in network.parameters() if id(parameter) not in left_out]
        adaptive_clip_grad(clipped, clip_factor=config.clip_grad_adaptive)
