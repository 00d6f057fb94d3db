"""Build optimizers by name and change their learning rates."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from configs.schema import Config, OptimizerConfig
from configs.schema.optim import BUILT_IN_OPTIMIZERS, OPTIMIZER_DEFAULTS
from configs.utils.errors import UserError
from train.optim.muon import Muon
from train.optim.param_groups import ParameterGroup, parameter_groups

Constructor = Callable[..., torch.optim.Optimizer]


class DeviceRates(NamedTuple):
    """The learning rates of all parameter groups of an optimizer, on the device, so that one kernel sets them.

    Attributes:
        values: Learning rates, float32 [groups]. Each group's `lr` is a view of its element.
        scales: `lr_scale` of the groups, float64 [groups], so that products are rounded once, as on the host.
    """

    values: torch.Tensor
    scales: torch.Tensor


# For each name: the class, the settings it takes, and the option that selects the implementation with fewest kernels.
TORCH: dict[str, tuple[type[torch.optim.Optimizer], tuple[str, ...], dict[str, bool]]] = {
    "adamw": (torch.optim.AdamW, ("betas", "eps"), {"fused": True}),
    "adam": (torch.optim.Adam, ("betas", "eps"), {"fused": True}),
    "sgd": (torch.optim.SGD, ("momentum", "nesterov"), {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, ("momentum", "eps"), {"foreach": True}),
}
CAPTURABLE = ("muon", *TORCH)  # all state is on the device, and zero before the first step
GUARDED_METHODS = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")  # and step, see _without_compiler
IMPLEMENTATIONS = {"foreach", "fused"}
# set by other settings, not options
RESERVED_OPTIONS = {"self", "params", "lr", "weight_decay", "capturable", "differentiable"}


def build_optimizer(model: nn.Module, config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Build the torch, timm or Muon optimizer that `config.name` selects.

    Args:
        model: Model whose parameters are optimized.
        config: Config section `train.optimizer`.
        lr: Peak learning rate of the run.

    Raises:
        UserError: The optimizer is unknown or unsupported, an option does not exist, the optimizer rejects a setting,
            or a pattern or factor in lr_scales is invalid.
    """
    groups = parameter_groups(model, config, lr)
    if config.name == "muon":
        if config.options:
            raise UserError(
                f"train.optimizer.options={config.options} cannot be used: muon has its settings in "
                "train.optimizer; leave it out, or take timm/muon, which has options"
            )
        return Muon(
            groups,
            lr,
            momentum=config.momentum,
            nesterov=bool(config.nesterov),
            steps=config.newton_schulz_steps,
            normalize=config.normalize_filters,
            sgd_momentum=config.sgd_momentum,
        )
    if config.name not in TORCH:
        return _build_timm_optimizer(groups, config, lr)
    kind, settings, implementation = TORCH[config.name]
    arguments: dict[str, object] = {name: getattr(config, name) for name in settings}
    if not IMPLEMENTATIONS & config.options.keys():
        arguments |= implementation
    arguments |= _checked_options(config, kind)
    try:
        return _without_compiler(kind)(groups, lr=lr, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(config, error) from None


def _without_compiler(kind: type[torch.optim.Optimizer]) -> Constructor:
    """Return a subclass of a torch optimizer whose methods do not import torch's compiler.

    torch wraps these methods for callers that are compiled, and the wrappers import the compiler on their first call,
    which takes a second. Here, only the model and the loss are compiled.
    """
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in GUARDED_METHODS}
    step = torch.no_grad()(inspect.unwrap(kind.step))  # like torch's wrapper, except in differentiable optimizers
    return type(kind.__name__, (kind,), {**methods, "step": step})


def with_timm_defaults(config: Config) -> Config:
    """Replace null settings of a timm optimizer with timm's defaults, so that the saved config contains their values.

    The config of a built-in optimizer is returned unchanged.

    Raises:
        UserError: The optimizer is unknown or unsupported, an option does not exist, or a setting is rejected.
    """
    asked = config.train.optimizer
    if asked.name in BUILT_IN_OPTIMIZERS:
        return config
    optimizer = _build_timm_optimizer([{"params": [nn.Parameter(torch.zeros(2, 2))]}], asked, config.train.lr)
    group = optimizer.param_groups[0]
    missing = [key for key in OPTIMIZER_DEFAULTS if getattr(asked, key) is None and key not in asked.options]
    used = asked.model_copy(update={key: group[key] for key in missing if key in group})
    return config.model_copy(update={"train": config.train.model_copy(update={"optimizer": used})})


def _build_timm_optimizer(groups: list[ParameterGroup], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Build a timm optimizer with the settings of `config`. Settings that are null keep timm's defaults.

    Raises:
        UserError: The optimizer is unknown, unsupported or not installed, an option does not exist, or a setting is
            rejected.
    """
    import timm.optim  # imported here, since it takes seconds

    name = config.name.removeprefix("timm/")
    names = [str(known) for known in timm.optim.list_optimizers()]
    if name.startswith("lookahead_"):
        raise UserError(
            f"train.optimizer.name={config.name} wraps an optimizer in Lookahead, which is a setting here; "
            f"use train.optimizer.name={name.removeprefix('lookahead_')} train.lookahead.every_steps=6"
        )
    if name not in names:
        near = difflib.get_close_matches(name, sorted({*TORCH, "muon", *names}), n=3)
        raise UserError(
            f"train.optimizer.name={config.name} is unknown; use adamw, sgd, adam, rmsprop, muon or an optimizer of "
            f"timm (timm.optim.list_optimizers() lists them), such as {', '.join(near or ['lamb', 'lion', 'nadamw'])}"
        )
    info = timm.optim.get_optimizer_info(name)
    if info.second_order:
        raise UserError(
            f"train.optimizer.name={config.name} needs second derivatives, which the training step does not compute; "
            "take one of first order, such as lamb or adamw"
        )
    try:
        kind = timm.optim.get_optimizer_class(name, bind_defaults=False)
    except (ImportError, AssertionError) as error:
        raise UserError(
            f"train.optimizer.name={config.name} is not available here ({error}); install it or use another"
        ) from None
    arguments: dict[str, object] = {"momentum": config.momentum} if info.has_momentum else {}
    if info.has_betas and config.betas is not None and "betas" not in config.options:
        if info.num_betas != len(config.betas):
            raise UserError(
                f"train.optimizer.betas={list(config.betas)} are not the {info.num_betas} that {config.name} takes; "
                f"give {info.num_betas}, or leave it out"
            )
        arguments["betas"] = config.betas
    if info.has_eps and config.eps is not None:
        arguments["eps"] = config.eps
    if config.nesterov is not None and "nesterov" in inspect.signature(kind).parameters:
        arguments["nesterov"] = config.nesterov
    arguments |= _checked_options(config, kind)
    create: Constructor = timm.optim.create_optimizer_v2
    try:
        return create(groups, opt=name, lr=lr, weight_decay=0.0, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise _refused(config, error) from None


def _checked_options(config: OptimizerConfig, kind: Constructor) -> dict[str, object]:
    """Return train.optimizer.options as arguments of the optimizer class, with lists as tuples.

    Raises:
        UserError: An option is not an argument of the class, or is set by another setting.
    """
    taken = [name for name in inspect.signature(kind).parameters if name not in RESERVED_OPTIONS]
    for name, value in config.options.items():
        if name not in taken:
            raise UserError(
                f"train.optimizer.options.{name}={value!r} is not an option of {config.name}; it has {', '.join(taken)}"
            )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.options.items()}


def _refused(config: OptimizerConfig, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(
        f"optimizer {config.name} refuses its settings ({reason}); change train.optimizer.options={config.options} or "
        "the settings beside it"
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, whitening_lr: float | None = None) -> None:
    """Set the learning rate of each group to `lr` times the group's `lr_scale`. Does not synchronize.

    If `whitening_lr` is given, it replaces `lr` for the group of the whitening layer's bias.
    """
    groups = optimizer.param_groups
    rates: DeviceRates | None = getattr(optimizer, "device_rates", None)
    if rates is not None:
        torch.mul(rates.scales, lr, out=rates.values)
        groups = [group for group in groups if group.get("whitening")] if whitening_lr is not None else []
    for group in groups:
        rate = whitening_lr if group.get("whitening") and whitening_lr is not None else lr
        set_group_rate(group, rate * group.get("lr_scale", 1.0))


def set_group_rate(group: ParameterGroup, rate: float) -> None:
    """Set the learning rate of a group. A rate on the device is set in place, since CUDA graphs hold its address."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Make the optimizer keep learning rates and step counts on the device, as CUDA graphs require.

    Graph capture bakes Python numbers in as constants, so later changes to them would have no effect on replay.
    Learning rates are float32, as torch's fused kernels expect.
    """
    groups = optimizer.param_groups
    values = torch.tensor([float(group["lr"]) for group in groups], dtype=torch.float32, device=device)
    scales = torch.tensor([group.get("lr_scale", 1.0) for group in groups], dtype=torch.float64, device=device)
    optimizer.device_rates = DeviceRates(values, scales)  # type: ignore[attr-defined]
    for group, rate in zip(groups, values.unbind(), strict=True):
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = True


def is_fused(config: OptimizerConfig) -> bool:
    """Return True if the optimizer is a fused implementation from torch, and can therefore skip a step on the device.

    Return False if train.optimizer.options contain "fused" or "foreach".
    """
    return config.name in TORCH and "fused" in TORCH[config.name][2] and not IMPLEMENTATIONS & config.options.keys()


def capture_obstacle(config: OptimizerConfig) -> str | None:
    """Return the reason the optimizer cannot be captured as part of a CUDA graph, or None if it can be."""
    if config.name not in CAPTURABLE:
        return f"optimizer {config.name} is not known to run as a CUDA graph, unlike {', '.join(CAPTURABLE)}"
    if chosen := sorted(IMPLEMENTATIONS & config.options.keys()):
        return f"train.optimizer.options choose an implementation ({', '.join(chosen)})"
    if config.options.get("dampening"):
        return "train.optimizer.options have a dampening, which the first step leaves out"
    return None
