"""Sparse convolution on image sites; knows nothing of segmentation models."""

from sparserefine.sparse.interface import Engine, Perceptron
from sparserefine.sparse.layers import ResidualBlock, SparseBatchNorm, SparseConv, conv
from sparserefine.sparse.plan import DownKind, Level, PaddedLevel, PaddedPlan, Plan, PlanSpec, Stencil
from sparserefine.sparse.quantisation import calibrating
from sparserefine.sparse.sites import PaddedSites, Sites
from sparserefine.sparse.unet import SparseUNet

__all__ = [
    "DownKind",
    "Engine",
    "Level",
    "PaddedLevel",
    "PaddedPlan",
    "PaddedSites",
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
]
