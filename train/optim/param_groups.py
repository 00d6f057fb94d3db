"""Parameter groups, with the weight decay and learning rate of each parameter."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from configs.schema import OptimizerConfig
from configs.utils.errors import UserError
from models import PixelClassifier
from models.speedrun import find_whitening

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


ParameterGroup = dict[str, object]  # "params" and the fields of GroupSettings


class GroupSettings(NamedTuple):
    """What the parameters of a group have in common."""

    weight_decay: float
    lr: float  # at the peak of the schedule
    lr_scale: float  # `lr` divided by the peak learning rate of the run
    muon: bool  # whether Muon optimizes the group, which it does for 4-D parameters
    whitening: bool  # whether the group is the bias of a whitening layer


def parameter_groups(model: nn.Module, config: OptimizerConfig, lr: float) -> list[ParameterGroup]:
    """Group trained parameters that have the same settings. Groups with weight decay come first.

    Args:
        model: Model whose parameters are optimized.
        config: Config section `train.optimizer`.
        lr: Peak learning rate of the run.

    Raises:
        UserError: A pattern of lr_scales matches no parameter, or its factor is negative.
    """
    whitening = find_whitening(model)
    undecayed = names_without_decay(model)
    factors = lr_factors(model, config)
    groups: dict[tuple[bool, GroupSettings], list[nn.Parameter]] = defaultdict(list)
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            own_lr = None
            if parameter.ndim <= 1 and name.rpartition(".")[2] == "bias":
                own_lr = config.norm_bias_lr if isinstance(module, NORMS) else config.bias_lr
            elif isinstance(module, nn.Linear):
                own_lr = config.linear_lr
            own_scale = 1.0 if own_lr is None else own_lr / lr
            lr_scale = own_scale * factors.get(name, 1.0)
            muon = config.name == "muon" and parameter.ndim == 4
            decays = (parameter.ndim > 1 or config.decay_biases) and not (muon and config.normalize_filters)
            decays = decays and name not in undecayed
            # Divide by own_scale, so that a separate rate keeps the decay at lr * weight_decay per step. Factors
            # by layer or name also scale the decay, as in BEiT (arXiv:2106.08254) and timm.
            weight_decay = config.weight_decay / own_scale if decays else 0.0
            settings = GroupSettings(weight_decay, lr * lr_scale, lr_scale, muon, module is whitening)
            groups[not decays, settings].append(parameter)
    ordered = sorted(groups, key=lambda key: key[0])
    return [{"params": groups[key], **key[1]._asdict()} for key in ordered]


def inner_network(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the prefix of the network's parameter names and the network without the pixel normalization."""
    return ("network.", model.network) if isinstance(model, PixelClassifier) else ("", model)


def names_without_decay(model: nn.Module) -> set[str]:
    """Return the names of parameters that a timm model excludes from weight decay, e.g. position embeddings."""
    prefix, network = inner_network(model)
    listed: Callable[[], Iterable[str]] = getattr(network, "no_weight_decay", set)
    patterns, names = listed(), [name for name, _ in network.named_parameters()]
    return {prefix + name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def lr_factors(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """Return the learning rate factors that layer_decay and lr_scales give to parameters, by parameter name.

    Parameters that are not in the dict have factor 1.

    Raises:
        UserError: A pattern of lr_scales matches no parameter, or its factor is negative.
    """
    prefix, network = inner_network(model)
    factors: dict[str, float] = {}
    if config.layer_decay is not None:
        layers = layer_indices(network)
        top = max(layers.values(), default=0)
        factors = {prefix + name: config.layer_decay ** (top - layer) for name, layer in layers.items()}
    names = [name for name, _ in model.named_parameters()]
    scales: dict[str, float] = {}
    for pattern, scale in config.lr_scales.items():
        found = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, prefix + pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise UserError(
                f"train.optimizer.lr_scales has {pattern!r}, which matches no parameter of this model; "
                f"there are names like {', '.join(near)}"
            )
        if scale < 0:
            raise UserError(f"train.optimizer.lr_scales has {scale} for {pattern!r}; use 0 or more")
        scales |= dict.fromkeys(found, scale)
    return factors | {name: factors.get(name, 1.0) * scale for name, scale in scales.items()}


def layer_indices(network: nn.Module) -> dict[str, int]:
    """Return the layer index of each parameter by name, counted from 0 at the input.

    The layers are those of timm's `group_matcher`, or of `layers_by_registration` if the network has no
    `group_matcher`.
    """
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        return layers_by_registration(network)
    from timm.models import group_parameters

    layers: dict[str, int] = group_parameters(network, matcher(coarse=False), reverse=True)
    return layers


def layers_by_registration(network: nn.Module) -> dict[str, int]:
    """Return the layer index of each parameter by name, for a network with modules registered from input to output.

    A child module with a parameter of two or more dimensions starts a layer. Other children, e.g. norms, belong to the
    previous layer. The children of an `nn.Sequential` count individually if none of them has children.
    """
    parts: list[tuple[str, nn.Module]] = []
    for name, child in network.named_children():
        is_plain = isinstance(child, nn.Sequential) and all(not list(each.children()) for each in child)
        parts += [(f"{name}.{inner}", each) for inner, each in child.named_children()] if is_plain else [(name, child)]
    layer = 0
    layers = dict.fromkeys((name for name, _ in network.named_parameters(recurse=False)), 0)
    has_weights = False  # of the current layer
    for path, part in parts:
        parameters = dict(part.named_parameters(prefix=path))
        if any(parameter.ndim > 1 for parameter in parameters.values()):
            layer += has_weights
            has_weights = True
        layers |= dict.fromkeys(parameters, layer)
    return layers
