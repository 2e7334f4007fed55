"""The three ensemblers against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparserefine.stages import perceptron
from sparserefine.stages.ensembler import Ensembler, EnsemblerConfig, GatedEnsembler, build_ensembler
from support import assert_close, engine_of

CONFIGS = [
    EnsemblerConfig(),
    EnsemblerConfig(fuser="paper"),
    EnsemblerConfig("minimum_entropy"),
    EnsemblerConfig("mean"),
]
K = 5


def built(config: EnsemblerConfig) -> Ensembler:
    return build_ensembler(config, K).double()


def pair(rows: int = 40) -> tuple[Tensor, Tensor]:
    coarse, sparse = 3 * torch.randn(2, rows, K, dtype=torch.float64)
    return coarse, sparse


def entropy_of(logits: Tensor) -> Tensor:
    """H = - sum p ln p."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1, keepdim=True)


def two_layers(x: Tensor, mlp: nn.Sequential) -> Tensor:
    first, _, last = mlp
    return (x @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias


def blend_of(ensembler: GatedEnsembler, coarse: Tensor, sparse: Tensor) -> Tensor:
    """W = sigmoid(MLP[p1, p2, H1, H2]), blend = w y1 + (1 - w) y2."""
    seen = torch.cat([coarse.softmax(1), sparse.softmax(1), entropy_of(coarse), entropy_of(sparse)], dim=1)
    w = 1 / (1 + (-two_layers(seen, ensembler.gate)).exp())
    return w * coarse + (1 - w) * sparse


def test_gated_starts_as_the_plain_blend() -> None:
    ensembler, (coarse, sparse) = built(EnsemblerConfig()), pair()
    assert_close(ensembler(coarse, sparse), blend_of(ensembler, coarse, sparse))


def test_gated_adds_what_the_fuser_learnt() -> None:
    ensembler, (coarse, sparse) = built(EnsemblerConfig()), pair()
    nn.init.normal_(ensembler.fuser[-1].weight)
    nn.init.normal_(ensembler.fuser[-1].bias)
    blend = blend_of(ensembler, coarse, sparse)
    assert_close(ensembler(coarse, sparse), blend + two_layers(blend, ensembler.fuser))


def test_the_papers_fuser_replaces_the_blend() -> None:
    ensembler, (coarse, sparse) = built(EnsemblerConfig(fuser="paper")), pair()
    blend = blend_of(ensembler, coarse, sparse)
    assert_close(ensembler(coarse, sparse), two_layers(blend, ensembler.fuser))


def test_gated_has_the_papers_shape() -> None:
    shapes = {name: tuple(value.shape) for name, value in build_ensembler(EnsemblerConfig(), 19).named_parameters()}
    assert shapes == {
        "gate.0.weight": (64, 40),
        "gate.0.bias": (64,),
        "gate.2.weight": (1, 64),
        "gate.2.bias": (1,),
        "fuser.0.weight": (64, 19),
        "fuser.0.bias": (64,),
        "fuser.2.weight": (19, 64),
        "fuser.2.bias": (19,),
    }


def test_minimum_entropy_takes_whole_rows() -> None:
    coarse, sparse = pair()
    expected = torch.where(entropy_of(coarse) < entropy_of(sparse), coarse, sparse)
    assert torch.equal(built(EnsemblerConfig("minimum_entropy"))(coarse, sparse), expected)


def test_minimum_entropy_prefers_the_sparse_one_of_equals() -> None:
    coarse, sparse = torch.zeros(1, K), torch.ones(1, K)
    assert torch.equal(build_ensembler(EnsemblerConfig("minimum_entropy"), K)(coarse, sparse), sparse)


def test_mean_is_the_log_of_the_mean_probability() -> None:
    coarse, sparse = pair()
    expected = ((coarse.softmax(1) + sparse.softmax(1)) / 2).log()
    assert_close(built(EnsemblerConfig("mean"))(coarse, sparse), expected)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_finite_with_finite_gradients(config: EnsemblerConfig, scale: float) -> None:
    ensembler = build_ensembler(config, K)
    coarse, sparse = (scale * t.float() for t in pair())
    coarse, sparse = coarse.requires_grad_(), sparse.requires_grad_()
    refined = ensembler(coarse, sparse)
    refined.sum().backward()
    assert refined.isfinite().all()
    assert coarse.grad.isfinite().all()
    assert sparse.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ensembler.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradcheck(config: EnsemblerConfig) -> None:
    ensembler = built(config)
    assert torch.autograd.gradcheck(ensembler, tuple(t.requires_grad_() for t in pair(3)))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_zero_sites(config: EnsemblerConfig) -> None:
    ensembler = built(config)
    coarse, sparse = (t.requires_grad_() for t in pair(0))
    refined = ensembler(coarse, sparse)
    refined.sum().backward()
    assert refined.shape == (0, K)
    assert all(p.grad is not None and not p.grad.any() for p in ensembler.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_inputs_are_left_alone(config: EnsemblerConfig) -> None:
    coarse, sparse = pair()
    before = coarse.clone(), sparse.clone()
    built(config)(coarse, sparse)
    assert torch.equal(coarse, before[0])
    assert torch.equal(sparse, before[1])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_macs_are_those_of_the_linear_layers(config: EnsemblerConfig) -> None:
    gated = 7 * (2 * (K + 1) * 64 + 64 + K * 64 + 64 * K)
    assert built(config).macs(7) == (gated if config.name == "gated" else 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"name": "median"}, "ensembler 'median', expected 'gated'"), ({"fuser": "none"}, "fuser 'none', expected")],
    ids=str,
)
def test_bad_configuration(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EnsemblerConfig(**arguments)


@pytest.mark.parametrize(
    ("coarse", "sparse", "words"),
    [
        ((4, K + 1), (4, K), r"coarse logits are \(4, 6\), sparse ones \(4, 5\); expected \[N, 5\] of both"),
        ((4, K + 1), (4, K + 1), r"expected \[N, 5\] of both"),
        ((4,), (4, K), r"coarse logits are \(4,\)"),
        ((4, K), (5, K), r"sparse ones \(5, 5\)"),
    ],
    ids=["classes", "of another base", "one dimension", "sites"],
)
def test_wrong_logits(coarse: tuple[int, ...], sparse: tuple[int, ...], words: str) -> None:
    """Refused before an engine sees them."""
    with pytest.raises(ValueError, match=words):
        GatedEnsembler(K)(torch.zeros(coarse), torch.zeros(sparse))


@pytest.mark.parametrize("engine", ["torch", "cpu-generic", "triton"])
def test_other_modules_must_have_the_shapes_of_ours(engine):
    """Kernels read the weights by them: a narrower matrix would be read past its end."""
    ensembler, logits = GatedEnsembler(3), torch.randn(2, 5, 3)
    ensembler.gate = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 1))
    with torch.no_grad(), pytest.raises(ValueError, match=r"first weight of the gate is \(64, 6\), expected \[64, 8\]"):
        ensembler(*logits, engine_of(engine))
    ensembler.gate = GatedEnsembler(3).gate
    ensembler.fuser[2] = nn.Linear(64, 4)
    with torch.no_grad(), pytest.raises(ValueError, match=r"last weight of the fuser is \(4, 64\), expected \[3, 64\]"):
        ensembler(*logits, engine_of(engine))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_columns_in_chunks_give_the_gradients_of_the_modules(name: str, autocast: bool) -> None:
    """More sites than one chunk; with autocast it computes in float32 all the same."""
    engine = engine_of(name)
    torch.manual_seed(3)
    ensembler = GatedEnsembler(3)
    nn.init.normal_(ensembler.fuser[-1].weight)
    coarse, sparse = 2 * torch.randn(2, 9001, 3)
    weights, results = torch.randn(9001, 3), []
    for reference in (False, True):
        ensembler.zero_grad()
        inputs = [t.clone().requires_grad_() for t in (coarse, sparse)]
        if reference:
            blend = blend_of(ensembler, *inputs)
            refined = blend + two_layers(blend, ensembler.fuser)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                refined = ensembler(*inputs, engine)
        (refined * weights).sum().backward()
        results.append([refined.detach(), *(t.grad for t in inputs), *(p.grad for p in ensembler.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - expected).norm() / expected.norm()) < 1e-4


def test_a_compiled_perceptron_has_the_same_bits_for_any_number_of_threads() -> None:
    engine, threads, results = engine_of("cpu"), torch.get_num_threads(), []
    torch.manual_seed(4)
    x, weights = torch.randn(6, 5000), (torch.randn(20, 6), torch.randn(20), torch.randn(2, 20), torch.randn(2))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
            result = engine.perceptron(leaves[0], tuple(leaves[1:]))
            result.square().sum().backward()
            results.append([result.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    with pytest.raises(ValueError, match="expected \\[I, N\\]"):
        engine.perceptron(x[:5], weights)
    assert engine.perceptron(x.double(), weights) is None


def test_gradients_of_gradients_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptron, "_CHUNK_COLUMNS", 4)
    shapes = ((3, 9), (4, 3), (4,), (2, 4), (2,))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradgradcheck(perceptron.column_perceptron, tensors)
