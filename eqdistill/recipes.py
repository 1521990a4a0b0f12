"""Recipes by which distilled sets are evaluated on networks."""

from ._outer._recipes import (
    dc as dc,
    evaluate as evaluate,
    Evaluations as Evaluations,
    frepo as frepo,
    Recipe as Recipe,
    zero_start as zero_start,
)
