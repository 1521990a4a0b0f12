"""The types of arguments: checked by beartype, and an error told in one line.

This module is imported before the import hook is there, and is not checked itself."""

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin, TypeVar, Union

import jax
import numpy as np
from beartype import beartype, BeartypeConf, FrozenDict
from beartype.roar import (
    BeartypeCallHintParamViolation,
    BeartypeCallHintReturnViolation,
)
from beartype.vale import Is
from jaxtyping import AbstractArray, AnnotationError, ArrayLike, PRNGKeyArray


_Fn = TypeVar("_Fn", bound=Callable)

# NumPy's numbers are numbers, and bools are none.
_IS_NUMBER: Any = Is[lambda x: not isinstance(x, bool)]
_NUMBERS: dict = {
    int: Annotated[int | np.integer, _IS_NUMBER],
    float: Annotated[int | float | np.integer | np.floating, _IS_NUMBER],
}
_CONF = BeartypeConf(hint_overrides=FrozenDict(_NUMBERS))
_WORDS = {
    Any: "anything",
    bool: "True or False",
    float: "a number",
    int: "an integer",
    str: "a string",
    type(None): "None",
}
# What stands for several types at once.
_UNIONS = {
    "an array, a list or a number": frozenset({*get_args(ArrayLike), list, tuple}),
    "an array or a number": frozenset(get_args(ArrayLike)),
    "one key, as `jax.random.key(0)` makes it": frozenset(get_args(PRNGKeyArray)),
}


# Jaxtyping makes a page of any error of a type checker, but for an `AnnotationError`,
# which it raises as it is.
class ArgumentError(AnnotationError, TypeError):
    """An argument, or a result, of the wrong type or shape."""


def typechecked(fn: _Fn) -> _Fn:
    """As `beartype.beartype`, but NumPy's numbers are numbers, bools are none, and an
    error is one line that names the argument, what came, and what was wanted."""
    checked = beartype(fn, conf=_CONF)  # pyright: ignore[reportCallIssue, reportArgumentType]
    signature = inspect.signature(fn)
    name = fn.__qualname__.removesuffix(".__init__").removesuffix(".__call__")

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        __tracebackhide__ = True
        try:
            return checked(*args, **kwargs)
        except BeartypeCallHintParamViolation as e:
            given = signature.bind(*args, **kwargs).arguments
            message = _of_argument(name, signature, given, str(e))
            raise ArgumentError(message) from None
        except BeartypeCallHintReturnViolation:
            # What jaxtyping has checked is its last argument.
            result = next(reversed(kwargs.values()))
            wanted = _wanted(signature.return_annotation)
            raise ArgumentError(
                f"`{name}` must return {wanted}; got {describe(result)}."
            ) from None

    return wrapper  # pyright: ignore[reportReturnType]


def _of_argument(
    name: str, signature: inspect.Signature, given: Mapping[str, Any], text: str
) -> str:
    from beartype.door import is_bearable  # Not needed unless there is an error.

    # Beartype looks at one item of a list only, at random: it may find the bad one no
    # more, but has named it.
    named = re.search(r"parameter \*{0,2}(\w+)=", text)
    bad = named[1] if named else ""
    for argument, value in given.items():
        parameter = signature.parameters[argument]
        hint = parameter.annotation
        if parameter.kind is parameter.VAR_POSITIONAL:
            hint = tuple[hint, ...]
        if hint is not parameter.empty and not is_bearable(value, hint, conf=_CONF):
            bad = argument
            break
    if bad not in given:
        return f"An argument of `{name}` is of the wrong type."
    hint = signature.parameters[bad].annotation
    shapes = []
    if _is_shaped(hint) and isinstance(given[bad], jax.Array):
        shapes = [
            f"`{other}` has shape {value.shape}"
            for other, value in given.items()
            if other != bad
            and isinstance(value, jax.Array)
            and _is_shaped(signature.parameters[other].annotation)
        ]
    return (
        f"`{bad}` of `{name}` must be {_wanted(hint)}; got {describe(given[bad])}"
        f"{', where ' if shapes else ''}{' and '.join(shapes)}."
    )


def _is_shaped(hint: Any) -> bool:
    options = get_args(hint) if _is_union(hint) else (hint,)
    return any(isinstance(x, type) and issubclass(x, AbstractArray) for x in options)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _wanted(hint: Any) -> str:
    """A type in words."""
    if _is_union(hint):
        options, words = dict.fromkeys(get_args(hint)), []
        for union, members in _UNIONS.items():
            if members <= options.keys():
                words.append(union)
                options = {x: None for x in options if x not in members}
        return " or ".join(dict.fromkeys([*words, *map(_wanted, options)]))
    if hint in _WORDS:
        return _WORDS[hint]
    text = hint.__qualname__ if isinstance(hint, type) else str(hint)
    text = re.sub(r"Union\[[\w.]*Array, [^]]* complex[^]]*\]", "ArrayLike", text)
    # Without the modules, which are not where users find a name.
    return f"`{re.sub(r'[A-Za-z_][A-Za-z_0-9]*[.](?=[A-Za-z_])', '', text)}`"


def describe(x: Any) -> str:
    """What came, in words: its type and shape, and no values."""
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        library = "JAX" if isinstance(x, jax.Array) else "NumPy"
        return f"a {library} array of {x.dtype} of shape {x.shape}"
    if isinstance(x, type):
        return f"the class {x.__qualname__} itself"
    if x is None or isinstance(x, bool):
        return str(x)
    kind = type(x).__qualname__
    if isinstance(x, Sequence | Mapping) and not isinstance(x, str):
        some = [*(x.values() if isinstance(x, Mapping) else x)][:100]
        kinds = dict.fromkeys(type(item).__qualname__ for item in some)
        of = f" of {', '.join([*kinds][:3])}" if kinds else ""
        return f"a {kind} of length {len(x)}{of}"
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
