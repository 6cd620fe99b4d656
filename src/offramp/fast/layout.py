"""The structures that kernels.cpp declares, for ctypes. Order and types are its own."""

from __future__ import annotations

import ctypes
from typing import ClassVar

FP32, BF16, INT8, INT4, INT8_FINE = range(5)
CHUNK = 256
"""Rows that go through the layers together: more cannot be watched."""
SIGNALS, GATE = {"max_prob": 0, "margin": 1}, 2
NO_NORM, PER_HEAD, WHOLE = range(3)
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu": 2}

_int, _float, _pointer, _long = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p, ctypes.c_int64


class MatrixStruct(ctypes.Structure):
    """One matrix product."""

    _fields_: ClassVar = [
        ("weights", _pointer),
        ("bias", _pointer),
        ("format", _int),
        ("outputs", _int),
        ("inputs", _int),
        ("first", _int),
        ("rows", _long),
        ("calls", _long),
    ]


class ExactStruct(ctypes.Structure):
    """What settles the largest logits of a head whose weights are held as codes."""

    _fields_: ClassVar = [("rows", _pointer), ("errors", _pointer)]


class LayerStruct(ctypes.Structure):
    """One decoder layer."""

    _fields_: ClassVar = [
        *((name, MatrixStruct) for name in ("qkv", "output", "gate_up", "down")),
        *((name, _pointer) for name in ("before_attention", "after_attention", "before_mlp")),
        *((name, _pointer) for name in ("after_mlp", "query_norm", "key_norm", "cosines", "sines")),
        ("window", _int),
        ("head_norm", _int),
    ]


class ModelStruct(ctypes.Structure):
    """Everything that does not change from call to call."""

    _fields_: ClassVar = [
        *((name, _int) for name in ("hidden", "heads", "kv_heads", "head_size", "inner")),
        *((name, _int) for name in ("rotary", "activation", "kv_format")),
        *((name, _float) for name in ("epsilon", "scale", "residual", "softcap")),
        *((name, _float) for name in ("logit_scale", "logit_softcap")),
        ("norm", _pointer),
        ("head", MatrixStruct),
        ("layers", ctypes.POINTER(LayerStruct)),
    ]


class TextStruct(ctypes.Structure):
    """Where the keys and values of one text lie."""

    _fields_: ClassVar = [
        *((name, _pointer) for name in ("keys", "values", "key_steps", "value_steps")),
        ("capacity", _long),
    ]


class RowsStruct(ctypes.Structure):
    """Whose row is whose, and at which position."""

    _fields_: ClassVar = [
        ("texts", ctypes.POINTER(_pointer)),  # to TextStruct
        ("text", ctypes.POINTER(_int)),
        ("position", ctypes.POINTER(_int)),
        ("count", _int),
    ]


class WatchStruct(ctypes.Structure):
    """What an exit within a run looks at."""

    _fields_: ClassVar = [
        ("down", ctypes.POINTER(MatrixStruct)),
        ("head", ctypes.POINTER(MatrixStruct)),
        ("exact", ctypes.POINTER(ExactStruct)),
        *((name, _pointer) for name in ("bars", "gates", "blocks", "order")),
        ("asks", ctypes.POINTER(RowsStruct)),
        ("rest", ctypes.POINTER(RowsStruct)),
        *((name, _pointer) for name in ("made", "seen", "scores")),
        ("signal", _int),
    ]
