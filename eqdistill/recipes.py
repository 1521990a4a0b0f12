"""Recipes: how models are made and trained when a distilled set is evaluated."""

from ._outer._recipes import (
    dc as dc,
    feature_regression as feature_regression,
    frepo as frepo,
    learned_rates as learned_rates,
    Recipe as Recipe,
    supervised as supervised,
    zero_start as zero_start,
)
from ._outer._scores import (
    augmentation_robust_score as augmentation_robust_score,
    label_robust_score as label_robust_score,
)
