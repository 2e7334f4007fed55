"""Doors to the models of torchvision, segmentation_models.pytorch (smp) and timm.

None of the three is needed by sparserefine: each is imported by its own door only, when that is called, and what is
missing or broken is told with its cure. The functions bear the names of the packages that they open.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparserefine.bases.checkpoint import first_line, load_renamed, read_checkpoint
from sparserefine.bases.loaded import LoadedModel, tensor_of
from sparserefine.images.classes import Classes, wheel
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD, check_normalisation

_log = logging.getLogger(__name__)

FOREGROUND = Classes(("background", "foreground"), (wheel(0), wheel(1)))
"""The classes of a model that has one output channel."""

_SMP_OUTPUTS: dict[str | None, Literal["logits", "scores"]] = {
    None: "logits",
    "identity": "logits",
    "logsoftmax": "logits",  # their softmax is the model's
    "softmax": "scores",
    "softmax2d": "scores",
    "sigmoid": "scores",
}
"""What a model of smp gives with each ``activation``; the others give labels, or nothing that is a probability."""

_SMP_KEYS = re.compile(
    r"_model_class|(encoder|decoder|psp)_\w+|in_channels|classes|activation|upsampling|upscale_mode|aux_params|"
    r"img_size|dynamic_img_size|dynamic_img_pad|strict_img_size|window_size|drop_rate|drop_path_rate"
)
"""What a configuration of smp may hold: arguments of its own models, then harmless ones of timm's encoders.

smp hands all others to ``timm.create_model``, where some name files that are unpickled (``checkpoint_path``) or weights
to be fetched (``pretrained_cfg`` and its like).
"""

_SAME_NAMES = ((r".*", r"\g<0>"),)
"""For :func:`load_renamed`: names are the model's own."""


class Adapted(nn.Module):
    """A foreign model, with what it wants of its input and what its output lacks made up for.

    Args:
        model: ``float [B, 3, h, w]`` -> any output that :func:`sparserefine.bases.loaded.tensor_of` takes.
        label: what messages call it.
        multiple: the model takes heights and widths that are multiples of this [px]: zeros (the mean colour) are added
            right and bottom, and what it says of them is cut off.
        bgr: the model takes blue, green, red.
        foreground: the model has one channel, the foreground's: its logit z becomes the logits [0, z] (their softmax is
            the sigmoid of z), its ``scores`` p become [1 - p, p]. ``None``: the output stays as it is.

    Attributes:
        settings: what the outputs depend on besides the weights (for
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
        """``float [B, 3, h, w]``, normalised red, green, blue -> ``[B, K, h', w']``; any h and w."""
        h, w = x.shape[-2:]
        bottom, right = -h % self.multiple, -w % self.multiple
        if self.bgr:
            x = x.flip(1)
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        output = tensor_of(self.model(x), self.label)
        if bottom or right:
            if output.shape[-2:] != x.shape[-2:]:  # h and w may lie between the pixels of a smaller output
                output = F.interpolate(output, x.shape[-2:], mode="bilinear", align_corners=False)
            output = output[..., :h, :w].contiguous()
        if self.foreground is None:
            return output
        rest = torch.zeros_like(output) if self.foreground == "logits" else 1 - output
        return torch.cat([rest, output], dim=1)


def torchvision(name: str, weights: str | Path, num_classes: int | None = None) -> LoadedModel:
    """A segmentation model of torchvision, such as ``deeplabv3_resnet50`` or ``lraspp_mobilenet_v3_large``.

    The class count is that of the weights. Auxiliary heads, which only training uses, are left out. The model upsamples
    its logits to the size of its input itself. Normalisation is ImageNet's, as in torchvision's recipes. A model with
    one output channel becomes one of two classes, background and foreground.

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
        raise ValueError(f"base torchvision:{name}: not a segmentation model of torchvision; {_near(name, names)}")

    def build(count: int | None) -> nn.Module:
        model: nn.Module = models.get_model(
            name, weights=None, weights_backbone=None, num_classes=count, aux_loss=False
        )
        return model

    return _opened(f"torchvision:{name}", build, weights, num_classes, dropped=("aux_classifier.",))


def timm(name: str, weights: str | Path, num_classes: int | None = None) -> LoadedModel:
    """A segmentation model that is registered with timm.

    timm itself holds classifiers and backbones, which are refused; this door is for segmentation models that your own
    code puts into its registry (``@timm.models.register_model``). The class count is that of the weights, mean and
    standard deviation are those of the model's ``pretrained_cfg``. A model with one output channel becomes one of two
    classes, background and foreground.

    Args:
        name: as ``timm.create_model`` takes it.
        weights: its state dict, ``.pth`` or ``.safetensors``.
        num_classes: K of the data; only where the model starts from, the weights decide.

    Raises:
        ValueError: unknown name, a model that does not segment, or weights of another model.
        FileNotFoundError: no such weights.
        ImportError: timm is missing, or a package that it needs is missing or broken.
    """
    package = _package("timm")
    if not package.is_model(name):
        raise ValueError(f"base timm:{name}: timm has no such model; {_near(name, package.list_models())}")

    def build(count: int | None) -> nn.Module:
        model: nn.Module = package.create_model(name, pretrained=False, num_classes=count)
        return model

    return _opened(f"timm:{name}", build, weights, num_classes)


def smp(name: str | Path) -> LoadedModel:
    """A model of segmentation_models.pytorch, as its ``save_pretrained`` writes it.

    * Normalisation is that of the encoder's pretrained weights (for ``tu-`` encoders timm knows it, for others smp asks
      the hub or its cache), ImageNet's where the configuration names no such weights or the hub cannot be asked. For
      a model trained on something else give ``base.mean`` and ``base.std``.
    * Most of its models take multiples of their encoder's stride only, mostly 32 px: the input is padded with zeros
      (the mean colour) right and bottom, and the output cropped, so that any size works.
    * A model with one output channel becomes one of two classes, background and foreground.
    * With ``activation`` softmax or sigmoid the outputs are scores. A model with a sigmoid for each of several classes
      has no class for pixels that are of none.

    The encoder's pretrained weights are not downloaded: the file has them. A configuration that could make timm read
    other files, or fetch some, is refused.

    Args:
        name: folder with ``config.json`` and ``model.safetensors``, or hub id.

    Raises:
        ValueError: not such a folder, weights of another model, or a model that does not map RGB to class scores.
        FileNotFoundError: no such folder, nor such a model on the hub.
        ImportError: segmentation_models.pytorch is missing, or a package that it needs is missing or broken.
    """
    package = _package("segmentation_models_pytorch", "segmentation-models-pytorch")
    label = f"smp:{name}"
    config = _smp_config(str(name), label)
    count, activation = config.get("classes", 1), config.get("activation")
    if config.get("in_channels", 3) != 3:
        raise ValueError(f"base {label}: takes {config['in_channels']} channels, expected 3 (red, green, blue)")
    if activation not in _SMP_OUTPUTS:
        raise ValueError(
            f"base {label}: activation = {activation!r} gives no class scores, expected none, 'softmax2d', "
            "'logsoftmax' or 'sigmoid'; remove it from config.json, the weights stay the same"
        )
    if count == 1 and "softmax" in (activation or ""):
        raise ValueError(f"base {label}: activation = {activation!r} of one class is always the same; use 'sigmoid'")
    try:
        # The file has the encoder's weights: naming others would download them first, to overwrite them.
        unneeded = {"encoder_weights": None} if "encoder_weights" in config else {}
        with contextlib.redirect_stdout(sys.stderr):  # it says where it loads from
            model = package.from_pretrained(str(name), strict=True, **unneeded)
    except Exception as error:  # whatever smp, timm, the hub and torch raise at a file that does not fit
        told = " ".join(str(error).split())[:300]  # which weights do not fit is told from the second line on
        raise ValueError(
            f"base {label}: cannot be loaded ({type(error).__name__}: {told}); expected what save_pretrained wrote, "
            "read by a segmentation_models_pytorch that is not older"
        ) from error
    mean, std, bgr = _smp_normalisation(package, config, label)
    outputs = _SMP_OUTPUTS[activation]
    adapted = Adapted(
        model,
        label,
        multiple=_smp_multiple(model, config),
        bgr=bgr,
        foreground=outputs if count == 1 else None,
    )
    classes = FOREGROUND if count == 1 else None
    return LoadedModel(adapted.eval(), 2 if count == 1 else count, classes, mean, std, outputs)


def _smp_config(name: str, label: str) -> dict[str, Any]:
    """The ``config.json`` of a model of smp."""
    path = Path(name) / "config.json"
    if not path.is_file():
        if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise FileNotFoundError(
                f"base {label}: no {path}; expected a folder that save_pretrained of a segmentation_models.pytorch "
                "model wrote, or a hub id <owner>/<model>"
            )
        from huggingface_hub import hf_hub_download  # smp needs it itself

        try:
            path = Path(hf_hub_download(name, "config.json"))
        except Exception as error:  # no such model, no network, no permission
            raise FileNotFoundError(
                f"base {label}: no such folder, and not to be had from the hub ({first_line(error)})"
            ) from error
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"base {label}: {path} is not JSON ({error})") from error
    if not isinstance(config, dict) or "_model_class" not in config:
        raise ValueError(
            f"base {label}: {path} names no _model_class; expected what save_pretrained of a "
            "segmentation_models.pytorch model wrote"
        )
    _check_smp(config, f"base {label}: {path}")
    return config


def _check_smp(config: Mapping[str, Any], where: str) -> None:
    """Raises ``ValueError`` where timm would be given files or a hub."""
    for key, value in config.items():
        if not _SMP_KEYS.fullmatch(key):
            raise ValueError(
                f"{where}: {key} = {value!r} is refused: of keys that are not smp's own, timm may take some as files "
                "to read or fetch; remove it, if the model is the same without"
            )
    encoder = config.get("encoder_name")
    if isinstance(encoder, str) and not re.fullmatch(r"[\w.-]+", encoder):  # as hf-hub:<id> and local-dir:<path>
        raise ValueError(
            f"{where}: encoder_name = {encoder!r} is elsewhere; expected the name of an encoder of smp, or "
            "'tu-<name of timm>'"
        )


def _smp_multiple(model: Any, config: Mapping[str, Any]) -> int:
    """What heights and widths must be multiples of [px]."""
    if not getattr(model, "requires_divisible_input_shape", True):  # a model that does not say so does
        return 1
    stride = int(model.encoder.output_stride)
    return 2 * stride if config["_model_class"] == "DPT" else stride  # its decoder halves once more, which it forgets


def _smp_normalisation(
    package: Any, config: Mapping[str, Any], label: str
) -> tuple[tuple[float, float, float], tuple[float, float, float], bool]:
    """Mean and spread for red, green, blue in 0..1, and whether the model takes blue first."""
    encoder, weights = config.get("encoder_name"), config.get("encoder_weights")
    if not encoder or not weights:
        return IMAGENET_MEAN, IMAGENET_STD, False
    try:
        found = package.encoders.get_preprocessing_params(encoder, pretrained=weights)
    except Exception as error:  # names that smp takes elsewhere, and whatever the hub raises
        _log.warning(
            f"base {label}: how encoder {encoder} ({weights}) is normalised cannot be found out "
            f"({first_line(error)}); ImageNet's mean and std are taken, unless base.mean and base.std are given; "
            "where there is no network, HF_HUB_OFFLINE=1 saves waiting for it"
        )
        return IMAGENET_MEAN, IMAGENET_STD, False
    scale = 1.0 if found["input_range"][1] == 1 else 255.0  # smp knows these two ranges
    mean, std = ([float(v) / scale for v in found[key]] for key in ("mean", "std"))
    check_normalisation(f"base {label}", mean, std)
    bgr = found["input_space"] == "BGR"
    order = (2, 1, 0) if bgr else (0, 1, 2)
    return (mean[order[0]], mean[1], mean[order[2]]), (std[order[0]], std[1], std[order[2]]), bgr


def _opened(
    label: str,
    build: Callable[[int | None], nn.Module],
    weights: str | Path,
    num_classes: int | None,
    dropped: Sequence[str] = (),
) -> LoadedModel:
    """The model of torchvision or timm with its weights, checked to be one that segments."""
    checkpoint = read_checkpoint(weights)
    model = _fitting(build, num_classes, checkpoint.tensors).eval()
    config = getattr(model, "pretrained_cfg", None)  # of timm's models
    config = config if isinstance(config, Mapping) else {}
    count = _channels(model, label, config.get("input_size", (3, 64, 64))[-2:])
    load_renamed(model, checkpoint.tensors, _SAME_NAMES, dropped, str(weights))
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    check_normalisation(f"base {label}", mean, std)
    if count == 1:
        adapted = Adapted(model, label, foreground="logits").eval()
        return LoadedModel(adapted, 2, FOREGROUND, tuple(mean), tuple(std))
    classes = checkpoint.classes_of(count, weights) if count else None
    return LoadedModel(model, count, classes, tuple(mean), tuple(std))


def _fitting(
    build: Callable[[int | None], nn.Module], num_classes: int | None, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The model with as many classes as its weights have.

    Where weights and model differ in the first dimension only, always by the same two numbers, that is the classifier.
    """
    model = build(num_classes)
    pairs = ((v, tensors[k]) for k, v in model.state_dict().items() if k in tensors and v.shape != tensors[k].shape)
    numbers = {(a.shape[0], b.shape[0]) if a.dim() and a.shape[1:] == b.shape[1:] else None for a, b in pairs}
    found = numbers.pop() if len(numbers) == 1 else None
    return build(found[1]) if found else model


def _channels(model: nn.Module, label: str, size: Sequence[int]) -> int | None:
    """Output channels of a model that segments; ``None`` where it does not take this size [px]."""
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, 3, *size))
    except Exception:  # another size may do; if none does, its own error is the one to show, when it is used
        return None
    shape = tuple(tensor_of(output, label).shape)
    if len(shape) != 4:
        raise ValueError(
            f"base {label}: its output is {shape}, expected [1, K, h, w]: it does not segment. timm holds classifiers "
            "and backbones; a segmentation model on one comes through smp:<folder> (encoder 'tu-<name of timm>') or "
            "python:<module>:<callable>"
        )
    return shape[1]


def _package(module: str, pip: str = "") -> Any:
    """Imports it; raises ``ImportError`` with the cure if that does not work, for whatever reason."""
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


def _near(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, 5, 0.5) or names[:8]
    return f"the nearest of its {len(names)} are {', '.join(found)}"
