"""Tests of tools.inference.export_formats."""

from __future__ import annotations

import pytest
import torch

from models import build_model, list_models
from tools.inference.export_formats import first_and_last_layers


@pytest.mark.parametrize("name", list_models())
def test_built_in_models_have_first_and_last_layers(name: str) -> None:
    with torch.device("meta"):
        network = build_model(name, 10)
    num_features, ends = first_and_last_layers(network.state_dict())
    assert network.get_submodule(ends["first_conv"]).weight.shape[1] == 3
    assert network.get_submodule(ends["classifier"]).weight.shape == (10, num_features)
