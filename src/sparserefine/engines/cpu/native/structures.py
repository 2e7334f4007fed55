"""The structures of the C++ sources in ctypes: same names, same fields, same order.

Loading an object compares their sizes with the compiled ones (``native/library.py``).
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_int64, c_void_p


class Activated(Structure):
    """One activated output of an epilogue, see ``gemm.h``."""

    _fields_ = (
        ("out", c_void_p),
        ("stride", c_int64),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("quantised", c_int64),
    )


class Epilogue(Structure):
    """What a kernel does with its sums, see ``gemm.h``."""

    _fields_ = (
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("bias", c_void_p),
        ("raw", c_void_p),
        ("raw_stride", c_int64),
        ("activated", Activated * 2),
    )


class Convolution(Structure):
    """Arguments of ``sr_convolve``."""

    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("n_in", c_int64),
        ("cin", c_int64),
        ("table", c_void_p),
        ("n", c_int64),
        ("taps", c_int64),
        ("weight", c_void_p),
        ("cout", c_int64),
        ("rows", c_void_p),
        ("n_out", c_int64),
        ("epilogue", Epilogue),
        ("zeros", c_void_p),
        ("scratch", c_void_p),
        ("threads", c_int64),
    )


class Winograd(Structure):
    """Arguments of ``sr_winograd``."""

    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("n", c_int64),
        ("cin", c_int64),
        ("tiles", c_void_p),
        ("quarters", c_void_p),
        ("n_tiles", c_int64),
        ("count", c_int64),
        ("m", c_int64),
        ("weight", c_void_p),
        ("cout", c_int64),
        ("epilogue", Epilogue),
        ("zeros", c_void_p),
        ("scratch", c_void_p),
        ("threads", c_int64),
    )


class Int8Convolution(Structure):
    """Arguments of ``sr_convolve_int8``."""

    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("n_in", c_int64),
        ("cin", c_int64),
        ("table", c_void_p),
        ("n", c_int64),
        ("taps", c_int64),
        ("weight", c_void_p),
        ("cout", c_int64),
        ("rows", c_void_p),
        ("n_out", c_int64),
        ("scale", c_void_p),
        ("epilogue", Epilogue),
        ("threads", c_int64),
    )


class WeightGradient(Structure):
    """Arguments of ``sr_weight_gradient``."""

    _fields_ = (
        ("x", c_void_p),
        ("n_in", c_int64),
        ("cin", c_int64),
        ("grad", c_void_p),
        ("cout", c_int64),
        ("table", c_void_p),
        ("n", c_int64),
        ("taps", c_int64),
        ("result", c_void_p),
        ("scratch", c_void_p),
        ("threads", c_int64),
    )


class Bf16Convolution(Structure):
    """Arguments of ``sr_convolve_bf16``."""

    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("n_in", c_int64),
        ("cin", c_int64),
        ("table", c_void_p),
        ("n", c_int64),
        ("taps", c_int64),
        ("weight", c_void_p),
        ("cout", c_int64),
        ("rows", c_void_p),
        ("n_out", c_int64),
        ("out", c_void_p),
        ("zeros", c_void_p),
        ("threads", c_int64),
    )


class Bf16Gradient(WeightGradient):
    """Arguments of ``sr_weight_gradient_bf16``."""


class Perceptron(Structure):
    """Arguments of ``sr_perceptron``."""

    _fields_ = (
        ("x", c_void_p),
        ("n", c_int64),
        ("inputs", c_int64),
        ("hidden", c_int64),
        ("outputs", c_int64),
        ("weight1", c_void_p),
        ("bias1", c_void_p),
        ("weight2", c_void_p),
        ("bias2", c_void_p),
        ("out", c_void_p),
        ("grad", c_void_p),
        ("grad_x", c_void_p),
        ("sums", c_void_p),
        ("scratch", c_void_p),
        ("threads", c_int64),
    )


class Grid(Structure):
    """The active cells of one level, see ``geometry.cpp``."""

    _fields_ = (
        ("bits", c_void_p),
        ("rank", c_void_p),
        ("batch", c_int64),
        ("height", c_int64),
        ("width", c_int64),
    )


class Mlp(Structure):
    """Weights of a :data:`sparserefine.sparse.interface.Perceptron`, see ``gate.cpp``."""

    _fields_ = (
        ("weight1", c_void_p),
        ("bias1", c_void_p),
        ("weight2", c_void_p),
        ("bias2", c_void_p),
        ("hidden", c_int64),
    )


class Axis(Structure):
    """Interpolation taps of one axis, see ``uncertainty.cpp``."""

    _fields_ = (("low", c_void_p), ("high", c_void_p), ("weight", c_void_p), ("size", c_int64))


class Sites(Structure):
    """Coordinates of the sites, of any strides."""

    _fields_ = (("coords", c_void_p), ("count", c_int64), ("site_stride", c_int64), ("column_stride", c_int64))


class Image(Structure):
    """An image ``[B, C, H, W]``."""

    _fields_ = (
        ("values", c_void_p),
        ("bytes", c_int64),
        ("batches", c_int64),
        ("channels", c_int64),
        ("height", c_int64),
        ("width", c_int64),
    )


class Level(Structure):
    """The cells of one level in one image, and where their means go, see ``context.cpp``."""

    _fields_ = (("cells", Sites), ("means", c_void_p))


class BlockMeans(Structure):
    """Arguments of ``sr_block_means``."""

    _fields_ = (
        ("coarse", c_void_p),
        ("classes", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("scores", c_int64),
        ("rows", Axis),
        ("columns", Axis),
        ("image", c_void_p),
        ("bytes", c_int64),
        ("channels", c_int64),
        ("valid", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("levels", POINTER(Level)),
        ("count", c_int64),
        ("floats", c_void_p),
        ("cursors", c_void_p),
        ("threads", c_int64),
    )


STRUCTURES: tuple[type[Structure], ...] = (
    *(Activated, Epilogue, Convolution, Winograd, Int8Convolution, WeightGradient),
    *(Bf16Convolution, Bf16Gradient, Perceptron),
    *(Grid, Mlp, Axis, Sites, Image, Level, BlockMeans),
)
"""All structures. The compiled objects have an entry point for the size of each."""
