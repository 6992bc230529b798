"""The structures of a message that is sent or received, for ctypes: struct iovec and struct msghdr."""

from __future__ import annotations

import ctypes


class IoVector(ctypes.Structure):
    """struct iovec: where a part lies, and its length in bytes."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class MessageHeader(ctypes.Structure):
    """struct msghdr; lengths in bytes but for that of the vector, which counts parts."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vector", ctypes.c_void_p),
        ("vector_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )
