"""Class names, which show whether two sets have the same classes."""

from typing import Any

import jax.core
import numpy as np
from jaxtyping import Array


def check_class_names(
    names: list[str] | tuple[str, ...] | None, num_classes: int
) -> tuple[str, ...] | None:
    """Returns the names of `num_classes` classes as a tuple."""
    if names is None:
        return None
    are_texts = all(isinstance(x, str) for x in names)
    if not are_texts or not len(names) == len({*names}) == num_classes:
        first = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"`class_names` must be {num_classes} different names, one for each class; "
            f"got {len(names)}: {first}."
        )
    return tuple(names)


def count_classes(
    labels: Array | np.ndarray, names: list[str] | tuple[str, ...] | None
) -> int:
    """The number of classes, or of columns of the labels, of a distilled set."""
    if labels.ndim == 2:
        return labels.shape[1]
    if isinstance(labels, jax.core.Tracer):
        return len(names or ())
    return max(int(np.asarray(labels).max()) + 1, len(names or ()))


def describe_class(index: int, names: tuple[str, ...] | None) -> str:
    """A class in words, such as `class 3 ('dog')`."""
    name = (names or ())[index : index + 1]
    return f"class {index}" + (f" ({name[0]!r})" if name else "")


def check_same_classes(a: str, named_a: Any, b: str, named_b: Any) -> None:
    """Checks that two sets, called `a` and `b`, have the same classes in the same
    order. A set without names matches any classes."""
    x, y = (getattr(named, "class_names", None) for named in (named_a, named_b))
    if x is None or y is None or x == y:
        return
    reasons = []
    for one, names, others in ((a, x, y), (b, y, x)):
        only = [repr(name) for name in names if name not in others]
        more = f" and {len(only) - 3} more" if len(only) > 3 else ""
        if only:
            reasons.append(f"only {one} has {', '.join(only[:3])}{more}")
    if not reasons:
        i = next(i for i in range(len(x)) if x[i] != y[i])
        reasons = [f"class {i} is {x[i]!r} in {a} and {y[i]!r} in {b}"]
    raise ValueError(
        f"{a} and {b} must have the same class names in the same order; "
        f"{', and '.join(reasons)}. To load a folder with the class order of another "
        "set, pass `class_names` to `datasets.from_folder`."
    )
