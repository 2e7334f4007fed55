"""Loaders for models of torchvision, segmentation_models.pytorch (smp) and timm, each named like its package.

All three packages are optional. A loader imports its package when it is called; if it is missing or broken, the error
says what to install.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparserefine.bases.checkpoint import check_files, load_renamed, read_checkpoint
from sparserefine.bases.loaded import LoadedModel, tensor_of
from sparserefine.files.json import read_json
from sparserefine.files.tensors import check_finite
from sparserefine.files.text import first_line
from sparserefine.images.classes import Classes, wheel
from sparserefine.images.normalisation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MOST_CHANNELS,
    check_normalisation,
    default_normalisation,
)

_log = logging.getLogger(__name__)

FOREGROUND = Classes(("background", "foreground"), (wheel(0), wheel(1)))
"""The classes of a model that has one output channel."""

_SMP_OUTPUTS: dict[str | None, Literal["logits", "scores"]] = {
    None: "logits",
    "identity": "logits",
    "logsoftmax": "logits",  # the softmax of log-probabilities is the probabilities
    "softmax": "scores",
    "softmax2d": "scores",
    "sigmoid": "scores",
}
"""What a model of smp returns for each ``activation``; other activations return labels, or no probabilities."""

_SMP_KEYS = re.compile(
    r"_model_class|(encoder|decoder|psp)_\w+|in_channels|classes|activation|upsampling|upscale_mode|aux_params|"
    r"img_size|dynamic_img_size|dynamic_img_pad|strict_img_size|window_size|drop_rate|drop_path_rate"
)
"""Keys that we accept in a configuration of smp: arguments of its own models, then harmless ones of timm's encoders.

smp passes all others to ``timm.create_model``, where some name files to unpickle (``checkpoint_path``) or weights to
download (``pretrained_cfg`` and similar).
"""

_SAME_NAMES = ((r".*", r"\g<0>"),)
"""Rules for :func:`load_renamed` that keep every name."""


class Adapted(nn.Module):
    """Wraps a foreign model: adapts its input (size, channel order) and its output (one channel).

    Args:
        model: ``float [B, C, h, w]`` -> any output that :func:`sparserefine.bases.loaded.tensor_of` takes.
        label: the model's name in messages.
        multiple: the model takes only heights and widths that are multiples of this [px]: the input is padded with
            zeros (the mean colour) at the right and bottom, and the output is cropped.
        bgr: the model takes channels in the order blue, green, red.
        foreground: for a model with one channel, the foreground: ``logits`` z become [0, z] (the softmax of which is
            the sigmoid of z), ``scores`` p become [1 - p, p]. ``None``: the output is not changed.

    Attributes:
        settings: everything except the weights that the outputs depend on (for
            :attr:`sparserefine.bases.base.FrozenBase.identity`).
    """

    def __init__(
        self,
        model: nn.Module,
        label: str,
        *,
        multiple: int = 1,
        bgr: bool = False,
        foreground: Literal["logits", "scores"] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.label = model, label
        self.multiple, self.bgr, self.foreground = multiple, bgr, foreground
        self.settings = repr((multiple, bgr, foreground))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB ``float [B, C, h, w]`` -> ``[B, K, h', w']``; any h and w."""
        h, w = x.shape[-2:]
        bottom, right = -h % self.multiple, -w % self.multiple
        if self.bgr:
            x = x.flip(1)
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        output = tensor_of(self.model(x), self.label)
        if bottom or right:
            if output.shape[-2:] != x.shape[-2:]:  # in a smaller output, h and w may fall between pixels
                output = F.interpolate(output, x.shape[-2:], mode="bilinear", align_corners=False)
            output = output[..., :h, :w].contiguous()
        if self.foreground is None:
            return output
        rest = torch.zeros_like(output) if self.foreground == "logits" else 1 - output
        return torch.cat([rest, output], dim=1)


def torchvision(name: str, weights: str | Path, num_classes: int | None = None) -> LoadedModel:
    """Loads a segmentation model of torchvision, such as ``deeplabv3_resnet50`` or ``lraspp_mobilenet_v3_large``.

    The weights determine the class count. Auxiliary heads, which only training uses, are left out. The model itself
    upsamples its logits to its input size. Normalisation is ImageNet's, as in torchvision's recipes. A model with one
    output channel gets two classes, background and foreground.

    Args:
        name: one of ``torchvision.models.list_models(module=torchvision.models.segmentation)``.
        weights: its state dict, ``.pth`` or ``.safetensors``.
        num_classes: K of the data; only where the model starts from, the weights decide.

    Raises:
        ValueError: unknown name, or weights of another model.
        FileNotFoundError: no such weights.
        ImportError: torchvision is missing, or does not fit the installed torch.
    """
    models = _package("torchvision").models
    names = models.list_models(module=models.segmentation)
    if name not in names:
        raise ValueError(f"base torchvision:{name}: not a segmentation model of torchvision; {_nearest(name, names)}")

    def build(count: int | None) -> nn.Module:
        model: nn.Module = models.get_model(
            name, weights=None, weights_backbone=None, num_classes=count, aux_loss=False
        )
        return model

    return _load_checked(f"torchvision:{name}", build, weights, num_classes, dropped=("aux_classifier.",))


def timm(name: str, weights: str | Path, num_classes: int | None = None) -> LoadedModel:
    """Loads a segmentation model that is registered with timm.

    timm's own models are classifiers and backbones, which are refused; this loader is for segmentation models that your
    own code adds to its registry (``@timm.models.register_model``). The weights determine the class count; mean and
    standard deviation are those of the model's ``pretrained_cfg``. A model with one output channel gets two classes,
    background and foreground.

    Args:
        name: a model name for ``timm.create_model``.
        weights: its state dict, ``.pth`` or ``.safetensors``.
        num_classes: K of the data; only where the model starts from, the weights decide.

    Raises:
        ValueError: unknown name, a model that is not for segmentation, or weights of another model.
        FileNotFoundError: no such weights.
        ImportError: timm is missing, or a package that it needs is missing or broken.
    """
    package = _package("timm")
    if not package.is_model(name):
        raise ValueError(f"base timm:{name}: timm has no such model; {_nearest(name, package.list_models())}")

    def build(count: int | None) -> nn.Module:
        model: nn.Module = package.create_model(name, pretrained=False, num_classes=count)
        return model

    return _load_checked(f"timm:{name}", build, weights, num_classes)


def smp(name: str | Path) -> LoadedModel:
    """Loads a model of segmentation_models.pytorch that its ``save_pretrained`` wrote.

    * Normalisation is that of the encoder's pretrained weights: timm knows it for ``tu-`` encoders, for others smp asks
      the hub or its cache. It is ImageNet's if the configuration names no such weights or the hub cannot be reached.
      For a model trained with another normalisation give ``base.mean`` and ``base.std``.
    * Most models take only multiples of their encoder's stride, mostly 32 px. Any size works here: the input is padded
      with zeros (the mean colour) at the right and bottom, and the output is cropped.
    * A model with one output channel gets two classes, background and foreground.
    * With ``activation`` softmax or sigmoid the outputs are scores. A model with one sigmoid for each of several
      classes has no class for pixels that belong to none of them.

    The encoder's pretrained weights are not downloaded: the stored file contains them. A configuration that could make
    timm read other files, or download any, is refused.

    Args:
        name: folder with ``config.json`` and ``model.safetensors``, or hub id.

    Raises:
        ValueError: files of another kind, weights of another model, or a model that does not map RGB to class scores.
        FileNotFoundError: neither a folder nor a model on the hub has this name.
        ImportError: segmentation_models.pytorch is missing, or a package that it needs is missing or broken.
    """
    package = _package("segmentation_models_pytorch", "segmentation-models-pytorch")
    label = f"smp:{name}"
    if Path(name).is_dir():
        check_files(Path(name))
    config = _smp_config(str(name), label)
    count, activation = config.get("classes", 1), config.get("activation")
    channels = config.get("in_channels", 3)
    if type(channels) is not int or not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f"base {label}: takes {channels} channels, expected 1 to {MOST_CHANNELS}")
    if activation not in _SMP_OUTPUTS:
        raise ValueError(
            f"base {label}: activation = {activation!r} gives no class scores, expected no activation, 'softmax2d', "
            "'logsoftmax' or 'sigmoid'; remove it from config.json, the weights stay the same"
        )
    if count == 1 and "softmax" in (activation or ""):
        raise ValueError(f"base {label}: activation = {activation!r} is constant for one class; use 'sigmoid'")
    try:
        # The file contains the encoder's weights: smp would download the named ones first, then overwrite them.
        no_download = {"encoder_weights": None} if "encoder_weights" in config else {}
        with contextlib.redirect_stdout(sys.stderr):  # it prints where it loads from
            model = package.from_pretrained(str(name), strict=True, **no_download)
    except Exception as error:  # smp, timm, the hub and torch raise many kinds for a file that does not fit
        reason = " ".join(str(error).split())[:300]  # all lines: the misfitting weights are named from the second on
        raise ValueError(
            f"base {label}: cannot be loaded ({type(error).__name__}: {reason}); expected files that save_pretrained "
            "of the installed segmentation_models_pytorch, or of an older one, wrote"
        ) from error
    check_finite(model.state_dict(), f"base {label}")
    mean, std, bgr = _smp_normalisation(package, config, channels, label)
    outputs = _SMP_OUTPUTS[activation]
    adapted = Adapted(
        model,
        label,
        multiple=_smp_multiple(model, config),
        bgr=bgr,
        foreground=outputs if count == 1 else None,
    )
    classes = FOREGROUND if count == 1 else None
    return LoadedModel(adapted.eval(), 2 if count == 1 else count, classes, mean, std, outputs, channels=channels)


def _smp_config(name: str, label: str) -> dict[str, Any]:
    """Reads and checks the ``config.json`` of a model of smp."""
    path = Path(name) / "config.json"
    if not path.is_file():
        if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise FileNotFoundError(
                f"base {label}: no {path}; expected a folder that save_pretrained of a segmentation_models.pytorch "
                "model wrote, or a hub id <owner>/<model>"
            )
        from huggingface_hub import hf_hub_download  # installed, as smp needs it

        try:
            path = Path(hf_hub_download(name, "config.json"))
        except Exception as error:  # no such model, no network, no permission
            raise FileNotFoundError(
                f"base {label}: no such folder, and cannot be fetched from the hub ({first_line(error)})"
            ) from error
    config = read_json(path)
    if "_model_class" not in config:
        raise ValueError(
            f"base {label}: {path} has no _model_class; expected the file that save_pretrained of a "
            "segmentation_models.pytorch model writes"
        )
    _check_smp(config, f"base {label}: {path}")
    return config


def _check_smp(config: Mapping[str, Any], where: str) -> None:
    """Raises ``ValueError`` if timm could be made to read other files or use a hub."""
    for key, value in config.items():
        if not _SMP_KEYS.fullmatch(key):
            raise ValueError(
                f"{where}: {key} = {value!r} is refused: smp passes keys that are not its own to timm, which may "
                "read or download files for them; remove it if the model does not need it"
            )
    encoder = config.get("encoder_name")
    if isinstance(encoder, str) and not re.fullmatch(r"[\w.-]+", encoder):  # such as hf-hub:<id> or local-dir:<path>
        raise ValueError(
            f"{where}: encoder_name = {encoder!r} is refused; expected the name of an encoder of smp, or "
            "'tu-<name of timm>', not a hub or a path"
        )


def _smp_multiple(model: Any, config: Mapping[str, Any]) -> int:
    """Heights and widths must be multiples of this [px]."""
    if not getattr(model, "requires_divisible_input_shape", True):  # without the attribute: assume yes
        return 1
    stride = int(model.encoder.output_stride)
    return (
        2 * stride if config["_model_class"] == "DPT" else stride
    )  # its decoder halves once more, which output_stride leaves out


def _smp_normalisation(
    package: Any, config: Mapping[str, Any], channels: int, label: str
) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean and standard deviation for pixels in 0..1, and whether the model takes blue, green, red."""
    if channels != 3:  # encoders were trained on RGB
        return *default_normalisation(channels), False
    encoder, weights = config.get("encoder_name"), config.get("encoder_weights")
    if not encoder or not weights:
        return IMAGENET_MEAN, IMAGENET_STD, False
    try:
        found = package.encoders.get_preprocessing_params(encoder, pretrained=weights)
    except Exception as error:  # names that smp does not know, and whatever the hub raises
        _log.warning(
            f"base {label}: cannot find the normalisation of encoder {encoder} ({weights}) ({first_line(error)}); "
            "using ImageNet's mean and std unless base.mean and base.std are given; without a network, "
            "HF_HUB_OFFLINE=1 avoids the wait"
        )
        return IMAGENET_MEAN, IMAGENET_STD, False
    scale = 1.0 if found["input_range"][1] == 1 else 255.0  # smp uses these two ranges
    mean, std = ([float(v) / scale for v in found[key]] for key in ("mean", "std"))
    check_normalisation(f"base {label}", mean, std)
    bgr = found["input_space"] == "BGR"
    order = (2, 1, 0) if bgr else (0, 1, 2)
    return (mean[order[0]], mean[1], mean[order[2]]), (std[order[0]], std[1], std[order[2]]), bgr


def _load_checked(
    label: str,
    build: Callable[[int | None], nn.Module],
    weights: str | Path,
    num_classes: int | None,
    dropped: Sequence[str] = (),
) -> LoadedModel:
    """Builds a model of torchvision or timm, checks that it is for segmentation, and loads its weights."""
    checkpoint = read_checkpoint(weights)
    model = _build_for(build, num_classes, checkpoint.tensors).eval()
    config = getattr(model, "pretrained_cfg", None)  # of timm's models
    config = config if isinstance(config, Mapping) else {}
    count = _output_channels(model, label, config.get("input_size", (3, 64, 64))[-2:])
    load_renamed(model, checkpoint.tensors, _SAME_NAMES, dropped, str(weights))
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    check_normalisation(f"base {label}", mean, std)
    if count == 1:
        adapted = Adapted(model, label, foreground="logits").eval()
        return LoadedModel(adapted, 2, FOREGROUND, tuple(mean), tuple(std), channels=3)
    classes = checkpoint.classes_of(count, weights) if count else None
    return LoadedModel(model, count, classes, tuple(mean), tuple(std), channels=3)


def _build_for(
    build: Callable[[int | None], nn.Module], num_classes: int | None, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """Builds the model with the class count of its weights.

    If weights and model differ in first dimensions only, and always by the same two numbers (a, b), these tensors are
    the classifier, and b is the class count.
    """
    model = build(num_classes)
    pairs = ((v, tensors[k]) for k, v in model.state_dict().items() if k in tensors and v.shape != tensors[k].shape)
    counts = {(a.shape[0], b.shape[0]) if a.dim() and a.shape[1:] == b.shape[1:] else None for a, b in pairs}
    classifier = counts.pop() if len(counts) == 1 else None
    return build(classifier[1]) if classifier else model


def _output_channels(model: nn.Module, label: str, size: Sequence[int]) -> int | None:
    """Output channels of a segmentation model; ``None`` if it does not take this input size [px]."""
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, 3, *size))
    except Exception:  # another size may work; if not, the model's own error shows when it is used
        return None
    shape = tuple(tensor_of(output, label).shape)
    if len(shape) != 4:
        raise ValueError(
            f"base {label}: its output is {shape}, expected [1, K, h, w]: it is not a segmentation model. timm's own "
            "models are classifiers and backbones; a segmentation model with such a backbone loads as smp:<folder> "
            "(encoder 'tu-<name of timm>') or python:<module>:<callable>"
        )
    return shape[1]


def _package(module: str, pip: str = "") -> Any:
    """Imports a package; if that fails for any reason, raises ``ImportError`` that says what to install."""
    pip = pip or module
    try:
        return importlib.import_module(module)
    except Exception as error:  # a torchvision that does not fit its torch raises RuntimeError
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        state = "is not installed" if missing else f"does not work here ({first_line(error)})"
        rest = "" if module == "torchvision" else ", and a torchvision"
        raise ImportError(
            f"{pip} {state}; `pip install {pip}`{rest} in the version that fits torch {torch.__version__}"
        ) from error


def _nearest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, 5, 0.5) or names[:8]
    return f"the closest of its {len(names)} names are {', '.join(found)}"
