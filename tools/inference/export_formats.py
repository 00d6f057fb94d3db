"""Write and load trained models in the export formats, and show how to use each format.

A writer takes a float32 model in evaluation mode on the CPU and an empty folder, and returns a short description of the
files. A loader takes this folder, and returns a function from uint8 pixels [B, 3, H, W] to float32 logits [B, classes].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import Normalize, PixelClassifier, build_model

MAX_ONNX_FILE_BYTES = 2**31 - 2**26  # of weights: protobuf's limit of 2 GiB, minus room for the graph

PredictFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exportable:
    """A model and its metadata."""

    model: PixelClassifier
    name: str  # argument of build_model: lenet …, or timm/NAME
    classes: tuple[str, ...]
    image_size: int  # height and width in pixels
    interpolation: str
    crop_mode: str  # of evaluation: center or squash, as in timm
    crop_fraction: float
    origin: Mapping[str, str | int]  # data set, epochs and checkpoint
    arguments: Mapping[str, object] = field(default_factory=dict)  # other arguments of build_model: activation, width …

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The exported graph, which normalizes images and takes any batch size. The torch and ONNX formats share it."""
        example = torch.zeros(2, 3, self.image_size, self.image_size, dtype=torch.uint8)  # 1 would become a constant
        batch = {"images": {0: torch.export.Dim("batch")}}
        with torch.no_grad():
            return torch.export.export(self.model, (example,), dynamic_shapes=batch)

    @property
    def metadata(self) -> dict[str, object]:
        """Metadata stored in every format."""
        return {
            "model": self.name,
            "classes": list(self.classes),
            "image_size": self.image_size,
            "interpolation": self.interpolation,
            "crop_mode": self.crop_mode,
            "crop_fraction": self.crop_fraction,
            "mean": shortest_decimals(self.model.normalize.mean),
            "std": shortest_decimals(self.model.normalize.std),
            **self.origin,
        }


def shortest_decimals(numbers: Tensor) -> list[float]:
    """Return the shortest decimals that round to these float32 numbers, such as 0.4914 for 0.4913999140262604."""
    return [float(str(number)) for number in numbers.numpy()]


def write_safetensors(exportable: Exportable, folder: Path) -> str:
    """Write model.safetensors, with the parameter names of the bare network, and config.json, both in timm's layout."""
    network, normalize = exportable.model.network, exportable.model.normalize
    preprocessing = {
        "input_size": (3, exportable.image_size, exportable.image_size),
        "interpolation": exportable.interpolation,
        "crop_pct": exportable.crop_fraction,
        "crop_mode": exportable.crop_mode,
        "mean": tuple(shortest_decimals(normalize.mean)),
        "std": tuple(shortest_decimals(normalize.std)),
    }
    ours = {"label_names": list(exportable.classes), "model_zhu": exportable.metadata}
    if exportable.name.startswith("timm/"):
        from timm.models import save_for_hf

        # these fields describe the weights that timm's authors trained
        of_other_weights = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
        ours["pretrained_cfg"] = dict.fromkeys(of_other_weights)
        save_for_hf(network, str(folder), model_config=ours, safe_serialization=True, data_config=preprocessing)
        return "weights, for timm"
    weights = network.state_dict()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    num_features, ends = first_and_last_layers(weights)
    config = {
        "architecture": exportable.name,
        "num_classes": len(exportable.classes),
        "model_args": dict(exportable.arguments),
        "num_features": num_features,
        **ours,
        "pretrained_cfg": {**preprocessing, "num_classes": len(exportable.classes), **ends},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return "weights, for build_model"


def first_and_last_layers(weights: dict[str, Tensor]) -> tuple[int, dict[str, str]]:
    """Return `num_features`, and the `first_conv` and `classifier` entries of timm's config.

    The first convolution is the first weight with 4 dimensions, and the classifier is the last weight with 2.
    `num_features` is the number of inputs of the classifier.
    """
    first_conv = next(name for name, tensor in weights.items() if tensor.dim() == 4)
    classifier = [name for name, tensor in weights.items() if tensor.dim() == 2][-1]
    ends = {"first_conv": first_conv, "classifier": classifier}
    return weights[classifier].shape[1], {key: name.removesuffix(".weight") for key, name in ends.items()}


def load_safetensors(folder: Path) -> PredictFunction:
    """Load the model as a user would, with only the settings in config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    metadata = config["model_zhu"]
    network: nn.Module
    if metadata["model"].startswith("timm/"):
        import timm

        network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        network = build_model(
            config["architecture"], config["num_classes"], image_size=metadata["image_size"], **config["model_args"]
        )
        network.load_state_dict(load_file(folder / "model.safetensors"))
    normalize = Normalize(config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"])
    return PixelClassifier(normalize, network).eval()


def write_torch(exportable: Exportable, folder: Path) -> str:
    """Write model.pt2, a graph that can be loaded without this project's code."""
    metadata = {"model_zhu.json": json.dumps(exportable.metadata)}
    torch.export.save(exportable.program, folder / "model.pt2", extra_files=metadata)
    return "graph, from uint8"


def load_torch(folder: Path) -> PredictFunction:
    module: PredictFunction = torch.export.load(folder / "model.pt2").module()
    return module


def write_onnx(exportable: Exportable, folder: Path) -> str:
    """Write model.onnx, with the weights in a separate file if they exceed MAX_ONNX_FILE_BYTES.

    Metadata values other than strings are stored as JSON.
    """
    program = torch.onnx.export(
        exportable.program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: "batch"}},
        verbose=False,
    )
    assert program is not None
    for key, value in exportable.metadata.items():
        program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    weights_bytes = sum(tensor.nbytes for tensor in exportable.model.state_dict().values())
    program.save(folder / "model.onnx", external_data=weights_bytes > MAX_ONNX_FILE_BYTES)
    return f"graph, from uint8, opset {program.model.opset_imports['']}"


def load_onnx(folder: Path) -> PredictFunction:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@dataclass(frozen=True)
class ExportFormat:
    write: Callable[[Exportable, Path], str]
    load: Callable[[Path], PredictFunction]


FORMATS = {
    "safetensors": ExportFormat(write_safetensors, load_safetensors),
    "torch": ExportFormat(write_torch, load_torch),
    "onnx": ExportFormat(write_onnx, load_onnx),
}


def usage_snippet(name: str, exportable: Exportable, folder: Path) -> str:
    """Return Python code that loads format `name` from `folder` and runs the model on `images`, uint8 [B, 3, H, W]."""
    if name == "torch":
        return (
            f"import torch\nmodel = torch.export.load({str(folder / 'model.pt2')!r}).module()\nlogits = model(images)"
        )
    if name == "onnx":
        return (
            "import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({str(folder / 'model.onnx')!r})\n"
            'logits = session.run(["logits"], {"images": images.numpy()})[0]'
        )
    if exportable.name.startswith("timm/"):
        return (
            "import timm, torch\n"
            f"model = timm.create_model({f'local-dir:{folder}'!r}, pretrained=True).eval()\n"
            "config = timm.data.resolve_model_data_config(model)\n"
            "mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))\n"
            "logits = model((images / 255 - mean) / std)"
        )
    return (
        "import json\n"
        "from models import build_model\n"
        "from safetensors.torch import load_file\n"
        f"config = json.load(open({str(folder / 'config.json')!r}, encoding='utf-8'))\n"
        "mean, std = (config['pretrained_cfg'][key] for key in ('mean', 'std'))\n"
        "model = build_model(\n"
        "    config['architecture'], config['num_classes'], mean=mean, std=std, **config['model_args']\n"
        ").eval()\n"
        f"model.network.load_state_dict(load_file({str(folder / 'model.safetensors')!r}))\n"
        "logits = model(images)"
    )
