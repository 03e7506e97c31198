"""Triton's interpreter, which runs where there is no GPU, is taught the bfloat16 that it lacks."""

import os


def _teach_bfloat16() -> None:
    """The interpreter keeps bfloat16 as raw 16-bit integers: dots would multiply those, and casts would cut digits."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return TensorHandle(np.matmul(wide(a), wide(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    plain_cast = InterpreterBuilder.cast_impl

    def cast(self, source, target):
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
            return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(wide(source), tl.float32)
        return plain_cast(self, source, target)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_ext = lambda self, source, target: cast(self, source, target)
    InterpreterBuilder.create_fp_trunc = lambda self, source, target: cast(self, source, target)


if os.environ.get("TRITON_INTERPRET") == "1":
    _teach_bfloat16()
