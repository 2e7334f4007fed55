"""Sparse convolution on image sites; knows nothing of segmentation models."""

from sparserefine.sparse.engine import Engine, engine_report, get_engine
from sparserefine.sparse.modules import ResidualBlock, SparseBatchNorm, SparseConv, conv
from sparserefine.sparse.plan import DownKind, Level, Plan, PlanSpec, Stencil
from sparserefine.sparse.sites import Sites
from sparserefine.sparse.unet import SparseUNet

__all__ = [
    "DownKind",
    "Engine",
    "Level",
    "Plan",
    "PlanSpec",
    "ResidualBlock",
    "Sites",
    "SparseBatchNorm",
    "SparseConv",
    "SparseUNet",
    "Stencil",
    "conv",
    "engine_report",
    "get_engine",
]
