"""The structures of penstock.h, field by field."""

from __future__ import annotations

import ctypes


def _fields(**kinds: str) -> list[tuple[str, type]]:
    """Fields from names by kind, in the order given."""
    types = {
        "pointers": ctypes.c_void_p,
        "sizes": ctypes.c_int64,
        "floats": ctypes.c_float,
        "ints": ctypes.c_int32,
    }
    return [(name, types[kind]) for kind, names in kinds.items() for name in names.split()]


class Attention(ctypes.Structure):
    """``PenstockAttention``."""

    _fields_ = _fields(
        pointers="query key_cache value_cache out query_start context block_table sinks",
        sizes="sequences heads kv_heads dim value_dim block_size table_stride "
        "query_token_stride query_head_stride window",
        floats="scale softcap",
        ints="threads bfloat16",
    )


class Rotary(ctypes.Structure):
    """``PenstockRotary``."""

    _fields_ = _fields(
        pointers="qkv cos sin q_norm k_norm key_cache value_cache slots",
        sizes="tokens heads kv_heads dim block_size qkv_stride",
        floats="eps",
        ints="threads bfloat16",
    )


class Linear(ctypes.Structure):
    """``PenstockLinear``."""

    _fields_ = _fields(pointers="weight bias", sizes="outputs inputs")


class Layer(ctypes.Structure):
    """``PenstockLayer``."""

    _fields_ = [
        *((name, Linear) for name in ("qkv", "out", "gate_up", "down")),
        *_fields(pointers="input_norm post_norm", floats="input_eps post_eps"),
        ("rotary", Rotary),
        ("attention", Attention),
    ]


class Step(ctypes.Structure):
    """``PenstockStep``."""

    _fields_ = [
        *_fields(
            pointers="cos sin slots query_start context block_table",
            sizes="tokens sequences table_stride",
        ),
        ("scratch", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]
