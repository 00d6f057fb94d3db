"""Pretrained weights are loaded from a file or the hub's cache, without network access."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.schema import ModelConfig
from configs.utils.errors import UserError
from models import PixelClassifier, build_from_config, build_model
from models.pretrained import build_pretrained, published_file
from tools.inference.export_formats import Exportable, shortest_decimals, write_safetensors

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up empty caches of the hub and of torch."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path / "hub"


def source_of(name: str, classes: int, **options: Any) -> nn.Module:
    """Build a timm model in which every tensor differs from its initial value."""
    torch.manual_seed(7)
    network: nn.Module = timm.create_model(name, num_classes=classes, **options)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return network


def start(
    name: str, pretrained: bool | str, classes: int = 10, size: int = 64, **model: Any
) -> tuple[PixelClassifier, str]:
    torch.manual_seed(0)
    config = ModelConfig(name=name, pretrained=pretrained, **model)
    return build_pretrained(config, classes, image_size=size, mean=MEAN, std=STD)


def drawn(name: str, classes: int = 10, size: int = 64, **model: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = build_from_config(ModelConfig(name=name, **model), classes, image_size=size, mean=MEAN, std=STD)
    return network.network.state_dict()


def is_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, bool]:
    return {name: ours[name].shape == theirs[name].shape and torch.equal(ours[name], theirs[name]) for name in ours}


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_file_sets_all_weights_except_a_new_head(ending: str, tmp_path: Path) -> None:
    weights, path = source_of("test_resnet", 33).state_dict(), tmp_path / f"weights{ending}"
    save_file(weights, path) if ending == ".safetensors" else torch.save({"state_dict": weights}, path)
    model, note = start("timm/test_resnet", str(path))
    ours = model.network.state_dict()
    assert [name for name, same in is_same(ours, weights).items() if not same] == ["fc.weight", "fc.bias"]
    new = drawn("timm/test_resnet")
    assert torch.equal(ours["fc.weight"], new["fc.weight"])
    assert note.startswith(
        f"loaded {len(weights) - 2} tensors from {path}; new: fc.weight, fc.bias; images are normalised"
    )


def test_pretrained_weights_do_not_change_later_random_numbers(tmp_path: Path) -> None:
    save_file(source_of("test_resnet", 33).state_dict(), tmp_path / "weights.safetensors")
    start("timm/test_resnet", str(tmp_path / "weights.safetensors"))
    after = torch.rand(3)
    drawn("timm/test_resnet")
    assert torch.equal(torch.rand(3), after)


def test_equal_number_of_classes_keeps_head(tmp_path: Path) -> None:
    weights = source_of("test_resnet", 10).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    model, note = start("timm/test_resnet", str(tmp_path / "weights.safetensors"))
    assert all(is_same(model.network.state_dict(), weights).values())
    assert "new:" not in note


def test_vit_position_embeddings_are_resampled_to_image_size(tmp_path: Path) -> None:
    theirs = source_of("test_vit", 33)  # made for 160 pixels
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    model, _ = start("timm/test_vit", str(tmp_path / "weights.safetensors"))
    same = is_same(model.network.state_dict(), theirs.state_dict())
    assert [name for name, one in same.items() if not one] == ["pos_embed", "head.weight", "head.bias"]
    expected = timm.layers.resample_abs_pos_embed(theirs.pos_embed, (4, 4), num_prefix_tokens=theirs.num_prefix_tokens)
    torch.testing.assert_close(model.network.pos_embed, expected)


def test_options_and_activation_apply_to_pretrained_model(tmp_path: Path) -> None:
    theirs = source_of("test_resnet", 5, layers=[1, 1, 2, 1])
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    options = {"layers": [1, 1, 2, 1]}
    model, _ = start("timm/test_resnet", str(tmp_path / "weights.safetensors"), activation="gelu", options=options)
    assert torch.equal(model.network.layer3[1].conv1.weight, theirs.layer3[1].conv1.weight)
    assert isinstance(model.network.act1, timm.layers.GELU)


def test_images_are_normalised_by_published_statistics(tmp_path: Path) -> None:
    save_file(source_of("test_resnet", 10).state_dict(), tmp_path / "weights.safetensors")
    model, _ = start("timm/test_resnet", str(tmp_path / "weights.safetensors"))
    published = timm.get_pretrained_cfg("test_resnet")
    torch.testing.assert_close(model.normalize.mean, torch.tensor(published.mean))
    torch.testing.assert_close(model.normalize.std, torch.tensor(published.std))
    assert list(published.mean) != MEAN


def exported(folder: Path, name: str) -> Path:
    """Export a model with its config.json; return the path of the weights."""
    model = build_from_config(ModelConfig(name=name), 10, image_size=32, mean=[0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7])
    folder.mkdir()
    names = tuple(f"class {number}" for number in range(10))
    write_safetensors(Exportable(model, name, names, 32, "bilinear", "center", 1.0, {}), folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize("name", ["lenet", "timm/test_resnet"])
def test_images_are_normalised_by_config_json_statistics(name: str, tmp_path: Path) -> None:
    path = exported(tmp_path / "export", name)
    model, note = start(name, str(path), size=32)
    assert (shortest_decimals(model.normalize.mean), shortest_decimals(model.normalize.std)) == (
        [0.2, 0.3, 0.4],
        [0.5, 0.6, 0.7],
    )
    assert (
        f"normalised with mean [0.2, 0.3, 0.4] and std [0.5, 0.6, 0.7], as specified by {path.parent}/config.json"
        in note
    )
    assert "pixels" not in note
    path.with_name("config.json").unlink()
    model, note = start(name, str(path), size=32)
    assumed = MEAN if name == "lenet" else list(timm.get_pretrained_cfg("test_resnet").mean)
    by = "the data set's" if name == "lenet" else "timm's for test_resnet"
    assert shortest_decimals(model.normalize.mean) == assumed
    assert f"{by}, since no config.json beside the file specifies others" in note


def test_older_timm_config_is_read_and_foreign_one_ignored(tmp_path: Path) -> None:
    path = exported(tmp_path / "export", "lenet")
    older = path.with_name("config.json")
    older.write_text('{"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7], "input_size": [3, 28, 28]}')
    model, note = start("lenet", str(path), size=32)
    assert shortest_decimals(model.normalize.mean) == [0.2, 0.3, 0.4]
    assert "the weights were trained at 28 pixels, and images here have 32" in note
    older.write_text('{"model_type": "resnet", "hidden_sizes": [1]}')
    model, note = start("lenet", str(path), size=32)
    assert shortest_decimals(model.normalize.mean) == MEAN
    assert "since no config.json beside the file specifies others" in note


def test_head_is_new_for_other_classes_of_same_number(tmp_path: Path) -> None:
    path = exported(tmp_path / "export", "lenet")
    config = ModelConfig(name="lenet", pretrained=str(path), activation="gelu")
    settings: dict[str, Any] = {"image_size": 32, "mean": MEAN, "std": STD}
    same = [f"class {number}" for number in range(10)]
    for classes, is_new in ((same, False), (same[::-1], True), (None, False)):
        _, note = build_pretrained(config, 10, **settings, classes=classes)
        assert ("new: " in note) == is_new
        assert "trained with the arguments {}, and the model here has {'activation': 'gelu'}" in note


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "5", '{"pretrained_cfg": 5}', '{"model_zhu": []}', '{"mean": [1, 2]}', "[" * 100_000,
        '{"mean": [0.5, 0.5, NaN], "std": [1, 1, 1]}', '{"mean": [0.5, 0.5, 1e999], "std": [1, 1, 1]}',
        '{"mean": ["a", 1, 1], "std": [1, 1, 1]}', '{"mean": [1, 1, 1], "std": [1, 0, 1]}', '{"mean": [1, 1, 1]}',
        '{"mean": [true, 1, 1], "std": [1, 1, 1]}', '{"input_size": "large"}', '{"num_classes": -1}',
        '{"num_classes": 1e99}', '{"model_zhu": {"classes": 5}}', '{"model_args": []}', "9" * 5000,
        '{"mean": [%s, 1, 1], "std": [1, 1, 1]}' % ("9" * 4000), "\udcff",
    ],
    ids=lambda content: content[:30],
)  # fmt: skip
def test_invalid_config_json_error_names_file(content: str, tmp_path: Path) -> None:
    path = exported(tmp_path / "export", "lenet")
    path.with_name("config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(
        UserError, match=r"config\.json, which describes .* (is not a mapping|cannot be read|has )"
    ) as caught:
        start("lenet", str(path), size=32)
    assert len(str(caught.value)) < 400
    path.with_name("config.json").unlink()
    path.with_name("config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json, .*cannot be read as JSON \(Is a directory\)"):
        start("lenet", str(path), size=32)


def test_published_weights_come_from_hub_cache(hub: Path) -> None:
    weights = source_of("test_resnet", 1000).state_dict()
    repository = timm.get_pretrained_cfg("test_resnet").hf_hub_id
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(weights, folder / "snapshots" / "abc" / "model.safetensors")
    model, _ = start("timm/test_resnet", True)
    same = is_same(model.network.state_dict(), weights)
    assert [name for name, one in same.items() if not one] == ["fc.weight", "fc.bias"]


def test_missing_published_weights_error_names_cache_and_command(hub: Path) -> None:
    for name in ("resnet10t", "resnet10t.c3_in1k"):
        with pytest.raises(UserError) as caught:
            start(f"timm/{name}", True)
        message = str(caught.value)
        assert f"the published weights of timm/{name} are not in {hub}" in message
        assert f"timm.create_model('{name}', pretrained=True)" in message
        assert "give the path of a file in model.pretrained" in message
        assert "\n" not in message


def test_older_weights_are_found_in_torch_cache(hub: Path) -> None:
    with pytest.raises(UserError, match=r"gcvit_tiny are not in .*torch/checkpoints"):
        published_file("timm/gcvit_tiny")
    file = hub.parent / "torch" / "checkpoints" / Path(timm.get_pretrained_cfg("gcvit_tiny").url).name
    file.parent.mkdir(parents=True)
    file.touch()
    assert published_file("timm/gcvit_tiny") == file


def test_model_without_published_weights_is_an_error() -> None:
    with pytest.raises(UserError, match="pretrained=true needs published weights, but model 'resnet18' has none;"):
        start("resnet18", True)
    with pytest.raises(UserError, match="timm publishes no weights of timm/botnet50ts_256"):
        start("timm/botnet50ts_256", True)
    with pytest.raises(UserError, match="Invalid pretrained tag"):
        start("timm/resnet18.none_such", True)


def test_weights_of_another_architecture_are_an_error(tmp_path: Path) -> None:
    networks = (
        source_of("resnet10t", 33),
        source_of("test_resnet", 33, layers=[1, 1, 2, 1]),
        source_of("test_vit", 33),
    )
    for number, network in enumerate(networks):
        path = tmp_path / f"{number}.safetensors"
        save_file(network.state_dict(), path)
        with pytest.raises(
            UserError, match=f"weights {path} do not fit model 'timm/test_resnet': .*same arch"
        ) as caught:
            start("timm/test_resnet", str(path))
        assert "\n" not in str(caught.value)


def test_built_in_model_loads_file_except_different_head(tmp_path: Path) -> None:
    theirs = build_model("resnet18", 33, width=8)
    torch.save({f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "weights.pth")
    model, note = start("resnet18", str(tmp_path / "weights.pth"), options={"width": 8})
    same = is_same(model.network.state_dict(), theirs.state_dict())
    assert [name for name, one in same.items() if not one] == ["fc.weight", "fc.bias"]
    assert "new: fc.weight, fc.bias; " in note
    torch.testing.assert_close(model.normalize.mean, torch.tensor(MEAN))


def test_tensors_of_other_shape_are_listed(tmp_path: Path) -> None:
    weights = build_model("resnet18", 10).state_dict()
    weights["conv1.weight"] = torch.zeros(64, 3, 7, 7)  # as in torchvision's ImageNet models
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"conv1.weight is \[64, 3, 7, 7\] there and \[64, 3, 3, 3\] here; take"):
        start("resnet18", str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match=r"bn1.weight is \[64\] there and \[8\] here, .* and \d+ more; take"):
        start("resnet18", str(tmp_path / "weights.pth"), options={"width": 8})
    weights["layer5.weight"] = torch.zeros(1)
    del weights["conv1.weight"], weights["bn1.bias"]
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"missing: conv1.weight, bn1.bias; unexpected: layer5.weight; take weights of the same"
    ):
        start("resnet18", str(tmp_path / "weights.pth"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("run-by-a-pickle"),)


def test_other_files_are_refused_without_running_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "evil.pth": {"a": Evil()},
        "text.pth": {"a": "b"},
        "list.bin": [torch.zeros(1)],
        "ours.pt": {"format": 1, "stream": {}, "model": {}},
    }
    for file, content in contents.items():
        torch.save(content, tmp_path / file)
    (tmp_path / "bytes.safetensors").write_bytes(b"\0" * 100)
    (tmp_path / "bytes.pth").write_bytes(b"abc")
    for file, reason in {
        "evil.pth": "are refused, since the file contains more than tensors",
        "text.pth": "are not tensors by name",
        "list.bin": "are not tensors by name",
        "ours.pt": "are a checkpoint of this program; name it in model.finetune",
        "bytes.safetensors": "cannot be read",
        "bytes.pth": "refused|cannot be read",
        "missing.pth": "do not exist; give the path",
        "missing.safetensors": "do not exist; give the path",
        ".": "are not a plain file",
    }.items():
        with pytest.raises(UserError, match=f"weights {file} .*({reason})") as caught:
            start("lenet", file, size=32)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run-by-a-pickle").exists()


def torchvision_resnet18(path: Path) -> dict[str, Tensor]:
    """Write the weights of torchvision's ResNet-18 for ImageNet, which has another first convolution than ours."""
    from torchvision.models import resnet18

    torch.manual_seed(7)
    weights = resnet18(num_classes=1000).state_dict()
    torch.save(weights, path)
    return weights


def test_weights_that_fit_in_part_are_refused_with_advice(tmp_path: Path) -> None:
    torchvision_resnet18(tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        start("resnet18", str(tmp_path / "x.pth"))
    assert str(caught.value).endswith(
        "x.pth do not fit the model, of which only the head may differ: of another shape: conv1.weight is "
        "[64, 3, 7, 7] there and [64, 3, 3, 3] here; take weights of the same architecture and options, or load only "
        "the 119 of 122 tensors that fit with model.pretrained_partial=true"
    )


def test_partial_weights_of_torchvision_are_loaded_by_name_and_reported(tmp_path: Path) -> None:
    theirs = torchvision_resnet18(tmp_path / "x.pth")
    model, note = start("resnet18", str(tmp_path / "x.pth"), pretrained_partial=True)
    ours, new = model.network.state_dict(), drawn("resnet18")
    same = is_same(ours, theirs)
    assert [name for name, one in same.items() if not one] == ["conv1.weight", "fc.weight", "fc.bias"]
    assert torch.equal(ours["conv1.weight"], new["conv1.weight"])
    assert note.startswith(
        f"loaded 119 tensors from {tmp_path / 'x.pth'}; new: fc.weight, fc.bias; of another shape: conv1.weight is "
        "[64, 3, 7, 7] there and [64, 3, 3, 3] here; images are normalised"
    )


def test_partial_weights_of_timm_are_loaded_by_name(tmp_path: Path) -> None:
    theirs = source_of("test_resnet", 33).state_dict()
    del theirs["layer1.0.bn1.weight"]
    save_file({**theirs, "extra.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="do not fit model 'timm/test_resnet'"):
        start("timm/test_resnet", str(tmp_path / "x.safetensors"))
    model, note = start("timm/test_resnet", str(tmp_path / "x.safetensors"), pretrained_partial=True)
    assert torch.equal(model.network.state_dict()["layer1.0.conv1.weight"], theirs["layer1.0.conv1.weight"])
    assert "; new: fc.weight, fc.bias; missing: layer1.0.bn1.weight; unexpected: extra.weight; images" in note


def test_partial_weights_without_any_fitting_tensor_are_refused(tmp_path: Path) -> None:
    torch.save({"net.weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"missing: conv1\.weight.*; unexpected: net\.weight; take weights of the same"):
        start("lenet", str(tmp_path / "x.pth"), size=32, pretrained_partial=True)


def test_torchvision_model_loads_its_weights_whole(tmp_path: Path) -> None:
    theirs = torchvision_resnet18(tmp_path / "x.pth")
    model, note = start("torchvision.models:resnet18", str(tmp_path / "x.pth"))
    same = is_same(model.network.state_dict(), theirs)
    assert [name for name, one in same.items() if not one] == ["fc.weight", "fc.bias"]
    assert note.startswith("loaded 120 tensors from ")
