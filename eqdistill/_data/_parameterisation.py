import abc
from typing import TYPE_CHECKING

import equinox as eqx


if TYPE_CHECKING:
    from ._distilled_set import DistilledSet


class AbstractParameterisation(eqx.Module):
    """The arrays that are learned instead of the pixels of a distilled set, such as
    [`eqdistill.Packed`][]. An [`eqdistill.DistilledSet`][] is its own parameterisation.
    """

    @abc.abstractmethod
    def decode(self) -> "DistilledSet":
        """Returns the distilled set, as a differentiable function of the arrays of this
        module."""
