"""Checks the types and shapes of arguments with beartype, and reports an error in one
line. This module is imported before the import hook, and is not checked itself."""

import difflib
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin, no_type_check, TypeVar, Union

import jax
import numpy as np
from beartype import beartype, BeartypeConf, FrozenDict, roar
from beartype.door import is_bearable
from beartype.vale import Is
from jaxtyping import AbstractArray, AnnotationError, ArrayLike, PRNGKeyArray


_Fn = TypeVar("_Fn", bound=Callable)
_NEW_KEY, *_OLD_KEYS = get_args(PRNGKeyArray)
_NOT_BOOL: Any = Is[lambda x: not isinstance(x, bool)]
# NumPy's numbers are numbers, bools are not, and a key is made by `jax.random.key`.
_OVERRIDES: Any = {
    int: Annotated[int | np.integer, _NOT_BOOL],
    float: Annotated[int | float | np.integer | np.floating, _NOT_BOOL],
} | dict.fromkeys(_OLD_KEYS, _NEW_KEY)
_CONF = BeartypeConf(hint_overrides=FrozenDict(_OVERRIDES))
_WORDS: Any = {bool: "True or False", float: "a number", int: "an integer"}
_WORDS |= {str: "a string", type(None): "None"}
_UNIONS = {
    "an array, a list or a number": {*get_args(ArrayLike), list, tuple},
    "an array or a number": {*get_args(ArrayLike)},
    "one key, such as `jax.random.key(0)`": {*get_args(PRNGKeyArray)},
}


class ArgumentError(AnnotationError, TypeError):
    """An argument or a result has the wrong type or shape. Jaxtyping turns any other
    exception of a type checker into a page of text."""


def typechecked(fn: _Fn) -> _Fn:
    """Like `beartype.beartype`, but an error is one line that names the argument, what
    was passed, and what was expected."""
    checked: Any = beartype(conf=_CONF)(fn)
    signature = inspect.signature(fn)
    name = fn.__qualname__.removesuffix(".__init__").removesuffix(".__call__")

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        __tracebackhide__ = True
        try:
            return checked(*args, **kwargs)
        except roar.BeartypeCallHintParamViolation:
            given = signature.bind(*args, **kwargs).arguments
            message = _describe_violation(name, signature.parameters, given)
        except roar.BeartypeCallHintReturnViolation:
            # Jaxtyping passes the result as the last keyword argument.
            result = describe([*kwargs.values()][-1])
            wanted = _describe_hint(signature.return_annotation)
            message = f"`{name}` must return {wanted}; got {result}."
        raise ArgumentError(message)

    return wrapper  # pyright: ignore[reportReturnType]


def suggest_arguments(module: types.ModuleType) -> None:
    """Makes errors for unknown keywords suggest the closest argument, for all public
    functions, classes and class methods of a module."""
    for name, x in list(vars(module).items()):
        is_ours = getattr(x, "__module__", "").startswith("eqdistill.")
        if is_ours and inspect.isfunction(x) and name[0] != "_":
            # Functions are pickled by their names in the modules that define them.
            for place in (module, sys.modules[x.__module__]):
                setattr(place, name, _suggest_arguments(x))
        elif is_ours and inspect.isclass(x) and not inspect.isabstract(x):
            for own, method in list(vars(x).items()):
                if own == "__init__":
                    setattr(x, own, _suggest_arguments(method))
                elif isinstance(method, classmethod):
                    suggests = _suggest_arguments(method.__func__)
                    setattr(x, own, classmethod(suggests))


@functools.cache
def _suggest_arguments(fn: Callable) -> Callable:
    parameters = inspect.signature(fn).parameters
    # Layers, such as `nn.group_norm`, are compared by identity.
    is_layer = "._nn." in fn.__module__ and len(parameters) == 1
    if is_layer or any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        return fn
    names = [name for name in parameters if name not in ("self", "cls")]

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        for name in kwargs.keys() - names:
            close = difflib.get_close_matches(name, names, 1, 0)
            hint = f"; did you mean `{close[0]}`?" if close else "."
            function = fn.__qualname__.removesuffix(".__init__")
            raise TypeError(f"`{function}` has no argument `{name}`{hint}")
        return fn(*args, **kwargs)

    return wrapper


# Jaxtyping's import hook would forget the sizes of the axes here.
@no_type_check
def _describe_violation(
    name: str, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]
) -> str:
    for bad, value in given.items():
        hint = parameters[bad].annotation
        is_many = parameters[bad].kind is inspect.Parameter.VAR_POSITIONAL
        if _is_wrong(value, Sequence[hint] if is_many else hint):
            break
    else:  # Beartype looks at one item of a nested sequence, chosen at random.
        return f"An argument of `{name}` has the wrong type."
    shapes = [
        f"`{other}` has shape {x.shape}"
        for other, x in given.items()
        if other != bad and all(isinstance(a, jax.Array) and a.ndim for a in (x, value))
    ]
    where = f", where {' and '.join(shapes)}" if shapes else ""
    wanted = _describe_hint(parameters[bad].annotation)
    return f"`{bad}` of `{name}` must be {wanted}; got {describe(value)}{where}."


def _options(hint: Any) -> tuple:
    is_union = get_origin(hint) in (Union, types.UnionType)
    return get_args(hint) if is_union else (hint,)


@no_type_check
def _is_wrong(value: Any, hint: Any) -> bool:
    is_list = lambda x: get_origin(x) is Sequence or get_args(x)[1:] == (...,)
    items = [get_args(x)[0] for x in _options(hint) if is_list(x)]
    if items and isinstance(value, list | tuple):
        return any(all(_is_wrong(x, item) for item in items) for x in value)
    return not is_bearable(value, hint, conf=_CONF)


def _describe_hint(hint: Any) -> str:
    options, words = [*_options(hint)], []
    if len(options) > 1:
        for union, members in _UNIONS.items():
            if members <= {*options}:
                words.append(union)
                options = [x for x in options if x not in members]
        return " or ".join(dict.fromkeys([*words, *map(_describe_hint, options)]))
    if get_origin(hint) in (Sequence, Mapping):
        kind = get_origin(hint).__name__.lower()
        return f"a {kind}, each item {_describe_hint(get_args(hint)[-1])}"
    is_class = isinstance(hint, type)
    text = hint.__qualname__ if is_class else str(hint)
    # Drop the modules, which differ from those of the public names.
    text = f"`{re.sub(r'[A-Za-z_][A-Za-z_0-9]*[.](?=[A-Za-z_])', '', text)}`"
    is_plain = is_class and not issubclass(hint, AbstractArray)
    return _WORDS.get(hint, _with_article(text) if is_plain else text)


def describe(x: Any) -> str:
    """Describes scalars by value, arrays by dtype and shape, and the rest by type."""
    if isinstance(x, bool | int | float | str | np.generic | None):
        return repr(x)[:60]
    if isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        kinds = {np.ndarray: "a NumPy array", jax.ShapeDtypeStruct: "an array"}
        return f"{kinds.get(type(x), 'a JAX array')} of {x.dtype} with shape {x.shape}"
    if isinstance(x, type | types.FunctionType):
        kind = "class" if isinstance(x, type) else "function"
        return f"the {kind} `{x.__name__}` itself"
    text = _with_article(type(x).__qualname__)
    if isinstance(x, Sequence | Mapping):
        some = [*(x.values() if isinstance(x, Mapping) else x)][:100]
        names = dict.fromkeys(type(item).__qualname__ for item in some)
        text += f" of length {len(x)} ({', '.join([*names][:3])})"
    return text.removesuffix(" ()")


def _with_article(text: str) -> str:
    return f"{'an' if text.lstrip('`_')[:1] in 'aeiouAEIOU' else 'a'} {text}"
