"""Sparse convolution on image sites; knows nothing of segmentation models."""

from sparserefine.sparse.engine import Engine, Perceptron, engine_report, get_engine
from sparserefine.sparse.modules import ResidualBlock, SparseBatchNorm, SparseConv, conv
from sparserefine.sparse.plan import DownKind, Level, Plan, PlanSpec, Stencil
from sparserefine.sparse.quantisation import calibrating
from sparserefine.sparse.sites import Sites
from sparserefine.sparse.unet import SparseUNet

__all__ = [
    "DownKind",
    "Engine",
    "Level",
    "Perceptron",
    "Plan",
    "PlanSpec",
    "ResidualBlock",
    "Sites",
    "SparseBatchNorm",
    "SparseConv",
    "SparseUNet",
    "Stencil",
    "calibrating",
    "conv",
    "engine_report",
    "get_engine",
]
