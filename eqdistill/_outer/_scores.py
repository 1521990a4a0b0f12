import math

from .._checks import check_between


def label_robust_score(
    *, hard_label_recovery: float, improvement_over_random: float, weight: float = 0.5
) -> float:
    r"""DD-Ranking's label-robust score, from 0 to 1, which removes the effect of soft
    labels from an accuracy. Higher is better:

    $$\frac{e^\alpha - e^{-1}}{e - e^{-1}}, \qquad
    \alpha = w \, \mathrm{IOR} - (1 - w) \, \mathrm{HLR}.$$

    All accuracies are fractions, from 0 to 1, after the last training step.

    **Arguments:**

    - `hard_label_recovery`: HLR, the accuracy of training on all real data, minus the
        accuracy of training on the distilled images with hard labels. Lower is better.
    - `improvement_over_random`: IOR, the accuracy of training on the distilled set as
        its authors do, minus the accuracy of the same training on an equal number of
        random real images.
    - `weight`: $w$, from 0 to 1.

    Source: Li et al., *DD-Ranking: Rethinking the evaluation of dataset distillation*,
    2025.
    """
    check_between(-1, 1, hard_label_recovery=hard_label_recovery)
    check_between(-1, 1, improvement_over_random=improvement_over_random)
    return _score(weight, improvement_over_random, -hard_label_recovery)


def augmentation_robust_score(
    *, improvement_with: float, improvement_without: float, weight: float = 0.5
) -> float:
    r"""DD-Ranking's augmentation-robust score, which removes the effect of augmentation
    from an accuracy: like [`eqdistill.recipes.label_robust_score`][], but with $\alpha
    = w \, \mathrm{IOR}_\mathrm{aug} + (1 - w) \, \mathrm{IOR}_\mathrm{none}$.

    **Arguments:**

    - `improvement_with`, `improvement_without`: the improvement over random real images
        if training on both uses augmentation, and if it does not.
    - `weight`: $w$, from 0 to 1.
    """
    check_between(-1, 1, improvement_with=improvement_with)
    check_between(-1, 1, improvement_without=improvement_without)
    return _score(weight, improvement_with, improvement_without)


def _score(weight: float, first: float, second: float) -> float:
    check_between(0, 1, weight=weight)
    alpha = weight * first + (1 - weight) * second
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
