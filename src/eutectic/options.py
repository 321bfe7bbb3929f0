"""Keyword arguments of public functions as frozen records."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeVar

from eutectic.errors import RequestError, suggest

Record = TypeVar("Record")

DTYPES = ("float16", "bfloat16", "float32", "float64")  # in which models are written
_DTYPES = {
    **{name: name for name in DTYPES},
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("bf16",), "bfloat16"),
    **dict.fromkeys(("fp32", "f32", "float", "single"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double"), "float64"),
}


def dtype_name(value: Any) -> Any:
    """Return torch's name of a dtype, of any usual spelling of it; other values as they are.

    >>> dtype_name("bf16"), dtype_name("FP32"), dtype_name("torch.float16"), dtype_name("int4")
    ('bfloat16', 'float32', 'float16', 'int4')
    """
    return _DTYPES.get(str(value).lower().removeprefix("torch."), value)


def options_from(record: type[Record], given: Mapping[str, Any], of: str) -> Record:
    """Return the keyword arguments of the function `of` as a record; unknown ones are refused."""
    known = [field.name for field in fields(record)]  # pyright: ignore[reportArgumentType]
    for name in given:
        if name not in known:
            raise RequestError(
                f"{of} has no option '{name}'.{suggest(name, known)}\nIt has: {', '.join(known)}."
            )
    return record(**given)


def listed(value: Any) -> Any:
    """Return several names or patterns as they are, and one that stands alone as a list of it.

    A string is a sequence too, of characters, and a `*` among these would match everything.

    >>> listed("*query*"), listed(["a", "b"]), listed(None)
    (['*query*'], ['a', 'b'], None)
    """
    return [value] if isinstance(value, str) else value


def not_names(values: Mapping[str, Any], *, optional: Collection[str] = ()) -> list[str]:
    """Return what is wrong with values that have to be several strings, some of them or None."""
    return [
        f"{name} must be a list of strings; got {value!r}"
        for name, value in values.items()
        if (value is not None or name not in optional)
        and not (isinstance(value, Sequence) and all(isinstance(v, str) for v in value))
    ]


def unset(record: type[Any]) -> frozenset[str]:
    """Return the fields of a record that are None where nothing is said of them."""
    return frozenset(f.name for f in fields(record) if f.default is None)


def not_numbers(
    values: Mapping[str, Any], *, whole: bool, optional: Collection[str] = ()
) -> list[str]:
    """Return what is wrong with values that have to be numbers, some of them or None.

    True is no number.

    >>> not_numbers({"seed": None, "samples": 1.5, "rank": None}, whole=True, optional=["rank"])
    ['seed must be a whole number; got None', 'samples must be a whole number; got 1.5']
    """
    kind, called = (Integral, "a whole number") if whole else (Real, "a number")
    return [
        f"{name} must be {called}; got {value!r}"
        for name, value in values.items()
        if (value is not None or name not in optional)
        and (isinstance(value, bool) or not isinstance(value, kind))
    ]
