"""The sparse U-Net against a dense one that is written here, layer by layer, on zero-filled images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparserefine.engines.choose import get_engine
from sparserefine.sparse import Plan, PlanSpec, Sites
from sparserefine.stages.extractor import PRESETS, ExtractorConfig, SparseUNet
from support import (
    PATTERNS,
    assert_close,
    at_sites,
    coarser_mask,
    dense_around,
    dense_down,
    dense_up,
    mask_of,
    on_grid,
)

DOWNS = ("paper", "cell")
K = 4


class DenseTwin:
    """The network as a dense one: every layer over the whole grid, cells that are not active held at zero.

    Layer by layer: y = mask * f(mask * x), with one mask a level; with all pixels active the masks do nothing.
    """

    def __init__(self, net: SparseUNet, down: str) -> None:
        self.net, self.down = net, down

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        masks = [mask]
        while len(masks) < len(self.net.descend):
            masks.append(coarser_mask(masks[-1], self.down))
        x = self._held(dense_around(image, self.net.stem.weight), mask)
        skips = []
        for depth, blocks in enumerate(self.net.descend):
            for block in blocks:
                x = self._residual(block, x, masks[depth])
            if depth < len(masks) - 1:
                skips.append(x)
                x = self._active(self.net.down_norms[depth], x, masks[depth])
                x = self._held(dense_down(x, self.net.down_convs[depth].weight, self.down), masks[depth + 1])
        for depth in reversed(range(len(skips))):
            x = self._active(self.net.up_norms[depth], x, masks[depth + 1])
            x = dense_up(x, self.net.up_convs[depth].weight, self.down, tuple(masks[depth].shape[1:]))
            x = torch.cat([skips[depth], self._held(x, masks[depth])], dim=1)
            for block in self.net.ascend[depth]:
                x = self._residual(block, x, masks[depth])
        x = self._active(self.net.head_norm, x, mask)
        return torch.einsum("bchw,kc->bkhw", x, self.net.head.weight) + self.net.head.bias[:, None, None]

    def _residual(self, block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        y = self._held(dense_around(self._active(block.norm1, x, mask), block.conv1.weight), mask)
        y = self._held(dense_around(self._active(block.norm2, y, mask), block.conv2.weight), mask)
        if isinstance(block.shortcut, nn.Linear):
            x = torch.einsum("bchw,oc->bohw", x, block.shortcut.weight)
        return x + y

    @staticmethod
    def _active(norm: nn.BatchNorm1d, x: Tensor, mask: Tensor) -> Tensor:
        """mask * relu(gamma (x - mean) / sqrt(var + eps) + beta)."""
        column = [t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
        mean, var, gamma, beta = column
        return DenseTwin._held((gamma * (x - mean) / (var + norm.eps).sqrt() + beta).relu(), mask)

    @staticmethod
    def _held(x: Tensor, mask: Tensor) -> Tensor:
        return x * mask[:, None]


def network(down: str, planes: tuple[int, ...] = (3, 4, 6), blocks: int = 2, inputs: int = 3) -> SparseUNet:
    """In float64, with normalisation layers that do something."""
    net = SparseUNet(inputs, K, planes, blocks=blocks, down=down).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 2.0),
                (module.bias.data, -0.5, 0.5),
            ):
                tensor.uniform_(low, high)
    return net.eval()


def plan_of(net: SparseUNet, mask: Tensor) -> Plan:
    return get_engine("torch").geometry(Sites.from_mask(mask), net.spec)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (7, 12), (5, 5), (2, 3), (1, 1), (1, 6)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("down", DOWNS)
def test_on_all_pixels_it_is_the_dense_network(down: str, size: tuple[int, int]) -> None:
    net, mask = network(down), mask_of("all", size, batch=2)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    assert_close(net(at_sites(image, mask), plan_of(net, mask)), at_sites(DenseTwin(net, down)(image, mask), mask))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("down", DOWNS)
def test_on_sites_it_is_the_dense_network_on_the_zero_filled_image(down: str, pattern: str) -> None:
    net, mask = network(down), mask_of(pattern, (13, 10), batch=3)
    x = torch.randn(int(mask.sum()), 3, dtype=torch.float64)
    assert_close(net(x, plan_of(net, mask)), at_sites(DenseTwin(net, down)(on_grid(x, mask), mask), mask))


@pytest.mark.parametrize("down", DOWNS)
def test_more_levels_than_the_image_has(down: str) -> None:
    net, mask = network(down, planes=(3, 3, 3, 3, 3), blocks=1), mask_of("all", (5, 4))
    x = torch.randn(20, 3, dtype=torch.float64)
    assert_close(net(x, plan_of(net, mask)), at_sites(DenseTwin(net, down)(on_grid(x, mask), mask), mask))


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_any_number_of_inputs(channels: int) -> None:
    net, mask = network("cell", inputs=channels), mask_of("random", (9, 7), batch=2)
    x = torch.randn(int(mask.sum()), channels, dtype=torch.float64)
    assert_close(net(x, plan_of(net, mask)), at_sites(DenseTwin(net, "cell")(on_grid(x, mask), mask), mask))


def test_a_single_level() -> None:
    net, mask = network("cell", planes=(5,)), mask_of("random", (6, 7))
    x = torch.randn(int(mask.sum()), 3, dtype=torch.float64)
    assert_close(net(x, plan_of(net, mask)), at_sites(DenseTwin(net, "cell")(on_grid(x, mask), mask), mask))


def test_images_of_a_batch_do_not_see_each_other() -> None:
    net, mask = network("cell"), mask_of("random", (9, 7), batch=2)
    x = torch.randn(int(mask.sum()), 3, dtype=torch.float64)
    first = int(mask[0].sum())
    alone = [net(x[:first], plan_of(net, mask[:1])), net(x[first:], plan_of(net, mask[1:]))]
    assert_close(net(x, plan_of(net, mask)), torch.cat(alone))


@pytest.mark.parametrize("down", DOWNS)
def test_training_runs_through_the_dense_network_too(down: str) -> None:
    """Gradients of all parameters, normalisation in evaluation mode so that both see the same statistics."""
    net, mask = network(down), mask_of("random", (7, 9), batch=2)
    x = torch.randn(int(mask.sum()), 3, dtype=torch.float64)
    cotangent = torch.randn(len(x), K, dtype=torch.float64)
    parameters = dict(net.named_parameters())
    sparse = torch.autograd.grad(net(x, plan_of(net, mask)), list(parameters.values()), cotangent)
    dense = at_sites(DenseTwin(net, down)(on_grid(x, mask), mask), mask)
    for name, actual, expected in zip(
        parameters, sparse, torch.autograd.grad(dense, list(parameters.values()), cotangent), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_input_is_left_alone() -> None:
    net, mask = network("cell"), mask_of("all", (4, 4))
    x = torch.randn(16, 3, dtype=torch.float64)
    before = x.clone()
    net(x, plan_of(net, mask))
    assert torch.equal(x, before)


# ---- few sites in training


@pytest.mark.parametrize("position", [None, (0, 0), (3, 4), (7, 7)], ids=["no site", "corner", "inside", "no window"])
@pytest.mark.parametrize("down", DOWNS)
def test_training_on_hardly_any_site(down: str, position: tuple[int, int] | None) -> None:
    """All finite, every parameter has a gradient, and statistics of a level change only if it has two rows."""
    net = network(down, blocks=1).train()
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    if position:
        mask[0, position[0], position[1]] = True
    plan = plan_of(net, mask)
    before = {name: value.clone() for name, value in net.named_buffers()}
    logits = net(torch.randn(int(mask.sum()), 3, dtype=torch.float64), plan)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    rows = [len(level.sites) for level in plan.levels]
    assert rows[0] == int(mask.sum())
    for name, value in net.named_buffers():
        kind, depth = name.split(".")[:2]
        n = 0 if kind == "head_norm" else rows[int(depth) + (kind == "up_norms")]
        if n < 2:
            assert torch.equal(value, before[name]), name


# ---- cost and configuration


def test_the_papers_network_has_79_million_parameters() -> None:
    config = PRESETS["paper"]
    with torch.device("meta"):  # no memory
        net = SparseUNet(config.channels(19), 19, config.planes, blocks=config.blocks, down=config.down)
    assert sum(p.numel() for p in net.parameters()) == 79_335_187


@pytest.mark.parametrize(("down", "taps", "cells"), [("cell", 4, 9), ("paper", 9, 4)])
def test_macs_against_a_hand_count(down: str, taps: int, cells: int) -> None:
    """planes (2, 3), one block, 5x5 pixels all active: 25 sites, then 3x3 or 2x2 cells."""
    net = SparseUNet(3, K, (2, 3), blocks=1, down=down)
    stem, head = 25 * 9 * 3 * 2, 25 * 2 * K
    descend = 25 * (9 * 2 * 2) * 2 + cells * (9 * 3 * 3) * 2
    # Up: of 3x3 each site multiplies all taps; of 2x2 each cell makes its four children.
    between = cells * taps * 2 * 3 + (25 if down == "paper" else cells) * taps * 3 * 2
    ascend = 25 * (9 * 4 * 2 + 9 * 2 * 2 + 4 * 2)  # two convolutions and the shortcut, 2 + 2 channels in
    assert net.macs(plan_of(net, mask_of("all", (5, 5)))) == stem + descend + between + ascend + head
    assert net.macs(plan_of(net, mask_of("none", (5, 5)))) == 0


@pytest.mark.parametrize("wrong", [PlanSpec(3, "paper"), PlanSpec(2, "cell")], ids=["kind", "levels"])
def test_a_plan_for_another_network_is_refused(wrong: PlanSpec) -> None:
    plan = get_engine("torch").geometry(Sites.from_mask(mask_of("all", (4, 4))), wrong)
    with pytest.raises(ValueError, match="plan was built for") as error:
        network("cell")(torch.zeros(16, 3, dtype=torch.float64), plan)
    assert str(wrong) in str(error.value)


def test_a_plan_of_other_sites_is_refused() -> None:
    net = network("cell")
    with pytest.raises(ValueError, match=r"\(9, 3\).*\[16, C_in\]"):
        net(torch.zeros(9, 3, dtype=torch.float64), plan_of(net, mask_of("all", (4, 4))))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"planes": ()}, r"planes = \(\)"),
        ({"planes": (4, 0)}, r"planes = \(4, 0\)"),
        ({"planes": (10**9,)}, r"planes = \(1000000000,\), expected whole numbers of channels, 1 to 65536"),
        ({"planes": (4,) * 40}, "planes = .*at most 16 levels"),
        ({"planes": (True, 4)}, "planes = "),
        ({"planes": (8192, 8192)}, "about 5e.09 weights, expected at most 1e.09; choose fewer channels or blocks"),
        ({"blocks": 0}, "blocks = 0"),
        ({"blocks": 10**9}, "blocks = 1000000000, expected a whole number, 1 to 100"),
        ({"features": ("rgb", "rgb")}, "features = .*each once"),
        ({"features": ()}, r"features = \(\)"),
        ({"features": ("rgb", "depth")}, "depth.*rgb.*coords.*probabilities.*entropy"),
        ({"down": "mean"}, "down = 'mean'"),
    ],
    ids=str,
)
def test_bad_configuration(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExtractorConfig(**changes)


def test_the_estimate_of_weights_is_about_right() -> None:
    """It is what bounds them; the published network has 79.3 million."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in PRESETS["paper"].build(19).parameters())
    config = PRESETS["paper"]
    assert 0.7 < weights / (36 * config.blocks * sum(c * c for c in config.planes)) < 1.3


def test_input_channels() -> None:
    assert ExtractorConfig().channels(19) == 3
    assert ExtractorConfig(features=("rgb", "coords", "probabilities", "entropy")).channels(19) == 3 + 2 + 19 + 1
