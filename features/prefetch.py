"""Tell the processor which memory compiled code will want soon; a hint that changes no result."""

from importlib import import_module
from typing import Any, Final

from features.compiled import types

_extending: Any = import_module("numba.extending")
_cgutils: Any = import_module("numba.core.cgutils")
_ir: Any = import_module("llvmlite.ir")

LINE: Final = 64
"""Bytes the processor fetches at a time; where they are more, a hint is given twice."""


@_extending.intrinsic
def prefetch(typing, array, row):  # type: ignore[no-untyped-def]  # numba counts the parameters
    """Fetch all of a row of a two-dimensional array in C order. The row must exist."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, values[0])
        byte, word = _ir.IntType(8).as_pointer(), _ir.IntType(32)
        hint = builder.module.declare_intrinsic("llvm.prefetch", [byte], _ir.FunctionType(_ir.VoidType(), [byte, word, word, word]))
        (stride, _) = _cgutils.unpack_tuple(builder, made.strides, 2)
        start = builder.gep(builder.bitcast(made.data, byte), [builder.mul(values[1], stride)])
        with _cgutils.for_range_slice(builder, context.get_constant(types.intp, 0), stride, context.get_constant(types.intp, LINE)) as (
            at,
            _,
        ):
            builder.call(hint, [builder.gep(start, [at]), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), code
