"""Sixteen float32 side by side as one value of compiled code, one lane for each of sixteen rows.

Numba leaves it to the loop vectoriser to find such values, and that has to prove first that arrays do not overlap. A value of this
type overlaps with nothing, and LLVM maps it to whatever vector registers the processor has. Every operation is IEEE 754's on each
lane alone, so a row's result depends neither on its neighbours nor on the processor.

    x = load(array, row, column)   16 floats of a float32[:, ::1] array from there on;   store(array, row, column, x)
    x + y, x - y, x * y            and splat(number): the number in every lane
    m = less(x, number)            a mask; never of NaN;   m & n, invert(m), everywhere()
    select(m, x, y), pick(m, number, number)
    add_wide(array, row, column, x)   add to 16 float64 in place
"""

import operator
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from features.compiled import types

_extending: Any = import_module("numba.extending")
_cgutils: Any = import_module("numba.core.cgutils")
ir: Any = import_module("llvmlite.ir")

LANES: Final = 16

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)
_FIRST = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
_ALL = ir.Constant(_BITS, [1] * LANES)


class _Floats(types.Type):  # type: ignore[misc]  # numba has no types for a checker
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


class _Mask(types.Type):  # type: ignore[misc]  # as above
    def __init__(self) -> None:
        super().__init__(name=f"bool1x{LANES}")


floats, mask = _Floats(), _Mask()


@_extending.register_model(_Floats)
class _FloatsModel(_extending.models.PrimitiveModel):  # type: ignore[misc]  # as above
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


@_extending.register_model(_Mask)
class _MaskModel(_extending.models.PrimitiveModel):  # type: ignore[misc]  # as above
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _BITS)


def _operation(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a function (builder, *LLVM values) an operation of compiled code; a kind None takes any array."""

    def define(emit: Callable[..., Any]) -> Any:
        def typed(_: Any, *given: Any) -> Any:
            signature = result(*(g if kind is None else kind for kind, g in zip(kinds, given, strict=True)))

            def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                made = [
                    context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
                    for kind, value in zip(signature.args, values, strict=True)
                ]
                found = emit(builder, *made)
                return context.get_dummy_value() if found is None else found

            return signature, code

        # Numba counts the parameters of what it is given.
        names = ", ".join(["context", *(f"a{i}" for i in range(len(kinds)))])
        scope: dict[str, Any] = {"typed": typed}
        exec(f"def {emit.__name__}({names}):\n    return typed({names})", scope)
        return _extending.intrinsic(scope[emit.__name__])

    return define


def _place(builder: Any, array: Any, row: Any, column: Any, vector: Any) -> Any:
    strides = _cgutils.unpack_tuple(builder, array.strides, 2)
    place = builder.ptrtoint(array.data, ir.IntType(64))
    place = builder.add(place, builder.mul(row, strides[0]))
    place = builder.add(place, builder.mul(column, strides[1]))
    return builder.inttoptr(place, vector.as_pointer())


def _splat(builder: Any, number: Any) -> Any:
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    one = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, nothing, _FIRST)


@_operation(floats, None, types.int64, types.int64)
def load(builder: Any, array: Any, row: Any, column: Any) -> Any:
    return builder.load(_place(builder, array, row, column, _FLOATS), align=4)


@_operation(types.void, None, types.int64, types.int64, floats)
def store(builder: Any, array: Any, row: Any, column: Any, values: Any) -> None:
    builder.store(values, _place(builder, array, row, column, _FLOATS), align=4)


@_operation(types.void, None, types.int64, types.int64, floats)
def add_wide(builder: Any, array: Any, row: Any, column: Any, values: Any) -> None:
    place = _place(builder, array, row, column, _DOUBLES)
    builder.store(builder.fadd(builder.load(place, align=8), builder.fpext(values, _DOUBLES)), place, align=8)


@_operation(floats, types.float32)
def splat(builder: Any, number: Any) -> Any:
    return _splat(builder, number)


@_operation(mask, floats, types.float32)
def less(builder: Any, values: Any, edge: Any) -> Any:
    return builder.fcmp_ordered("<", values, _splat(builder, edge))


@_operation(mask)
def everywhere(builder: Any) -> Any:
    return _ALL


@_operation(mask, mask)
def invert(builder: Any, flags: Any) -> Any:
    return builder.not_(flags)


@_operation(floats, mask, floats, floats)
def select(builder: Any, flags: Any, yes: Any, no: Any) -> Any:
    return builder.select(flags, yes, no)


@_operation(floats, mask, types.float32, types.float32)
def pick(builder: Any, flags: Any, yes: Any, no: Any) -> Any:
    return builder.select(flags, _splat(builder, yes), _splat(builder, no))


@_operation(floats, floats, floats)
def _plus(builder: Any, left: Any, right: Any) -> Any:
    return builder.fadd(left, right)


@_operation(floats, floats, floats)
def _minus(builder: Any, left: Any, right: Any) -> Any:
    return builder.fsub(left, right)


@_operation(floats, floats, floats)
def _times(builder: Any, left: Any, right: Any) -> Any:
    return builder.fmul(left, right)


@_operation(mask, mask, mask)
def _both(builder: Any, left: Any, right: Any) -> Any:
    return builder.and_(left, right)


def _overload(symbol: Any, operation: Any, kind: Any) -> None:
    @_extending.overload(symbol)
    def chosen(left, right):  # type: ignore[no-untyped-def]  # numba compares the signatures
        if left == kind and right == kind:
            return lambda left, right: operation(left, right)  # noqa: PLW0108  # numba wants a function of its own
        return None


_overload(operator.add, _plus, floats)
_overload(operator.sub, _minus, floats)
_overload(operator.mul, _times, floats)
_overload(operator.and_, _both, mask)
