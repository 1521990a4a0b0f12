import math


def label_robust_score(
    *,
    hard_label_recovery: float,
    improvement_over_random: float,
    weight: float = 0.5,
) -> float:
    r"""The label-robust score of DD-Ranking, which takes out of an accuracy what soft
    labels alone do,

    $$\frac{e^\alpha - e^{-1}}{e - e^{-1}}, \qquad
    \alpha = w \, \mathrm{IOR} - (1 - w) \, \mathrm{HLR}.$$

    All accuracies are fractions, from 0 to 1, after the last step of the training.

    **Arguments:** (Keyword only.)

    - `hard_label_recovery`: the accuracy of training on all real data, less that of
        training on the distilled images with hard labels. The lower, the better.
    - `improvement_over_random`: the accuracy of training on the distilled set as its
        authors do, less that of training so on as many random real images.
    - `weight`: $w$, from 0 to 1.

    **Returns:**

    The score, from 0 to 1. The higher, the better.

    **Raises:**

    A `ValueError` if an argument is out of its range.

    Source: Li et al., *DD-Ranking: Rethinking the evaluation of dataset distillation*,
    2025.
    """
    _check("hard_label_recovery", hard_label_recovery, -1)
    _check("improvement_over_random", improvement_over_random, -1)
    _check("weight", weight, 0)
    alpha = weight * improvement_over_random - (1 - weight) * hard_label_recovery
    return _normalise(alpha)


def augmentation_robust_score(
    *,
    improvement_with: float,
    improvement_without: float,
    weight: float = 0.5,
) -> float:
    r"""The augmentation-robust score of DD-Ranking, which takes out of an accuracy what
    augmentation alone does: as [`eqdistill.recipes.label_robust_score`][], with
    $\alpha = \gamma \, \mathrm{IOR}_{\mathrm{aug}} + (1 - \gamma) \,
    \mathrm{IOR}_{\mathrm{none}}$.

    **Arguments:** (Keyword only.)

    - `improvement_with`, `improvement_without`: the improvement over random real
        images, when both are trained on with augmentation, and without.
    - `weight`: $\gamma$, from 0 to 1.

    **Returns:**

    The score, from 0 to 1. The higher, the better.

    **Raises:**

    A `ValueError` if an argument is out of its range.

    Source: Li et al. 2025, as above.
    """
    _check("improvement_with", improvement_with, -1)
    _check("improvement_without", improvement_without, -1)
    _check("weight", weight, 0)
    return _normalise(weight * improvement_with + (1 - weight) * improvement_without)


def _normalise(alpha: float) -> float:
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def _check(name: str, value: float, low: int) -> None:
    if not low <= value <= 1:
        raise ValueError(f"`{name}` must be from {low} to 1; got {value}.")
