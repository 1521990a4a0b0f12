import abc

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._classifier import squared_norm
from ._distilled_set import DistilledSet
from ._losses import classification_loss


def inner_loss(classifier: PyTree, distilled: DistilledSet) -> Float[Array, ""]:
    r"""The objective of the inner problem, for a classifier with parameters $w$:

    $$\frac{1}{n} \sum_{i=1}^n \ell(y_i, w(\theta_i)) + \frac{\lambda}{2} \|w\|^2.$$

    **Arguments:**

    - `classifier`: a map from one image to its logits.
    - `distilled`: the images $\theta$, their labels $y$ and the ridge $\lambda$.

    **Returns:**

    The mean cross-entropy on the distilled images plus the ridge.

    Source: the code of JAXopt's dataset-distillation notebook. (Its formula has no
    factor of one half.)
    """
    loss = classification_loss(classifier, distilled.images, distilled.labels)
    return loss + 0.5 * distilled.l2 * squared_norm(classifier)


def gradient_norm(classifier: PyTree, distilled: DistilledSet) -> Float[Array, ""]:
    """The Euclidean norm of the inner loss's gradient in the parameters: a diagnostic,
    which is not to be differentiated."""
    classifier, distilled = jax.tree.map(
        lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x,
        (classifier, distilled),
    )
    return optax.tree.norm(eqx.filter_grad(inner_loss)(classifier, distilled))


class Fitted(eqx.Module):
    r"""A classifier fitted to a distilled set.

    **Attributes:**

    - `classifier`: the fitted classifier, differentiable in the distilled set.
    - `converged`: whether the inner solver reached its own tolerance.
    - `steps`: the number of steps that it took, those of a line search included.
    - `gradient_norm`: the Euclidean norm of the gradient of the inner loss in the
        parameters at the fitted classifier: the inner residual, zero at an exact fit.
    - `next_start`: a classifier for the solver to start from when the distilled set has
        changed a little, as it does from one outer step to the next; or `None`, if that
        had better be where this fit started from.
    """

    classifier: PyTree
    converged: Bool[Array, ""]
    steps: Int[Array, ""]
    gradient_norm: Float[Array, ""]
    next_start: PyTree = None


class AbstractInnerSolver(eqx.Module):
    """How a classifier is fitted to a distilled set, and how that fit is
    differentiated.

    This is the one place in which systems of dataset distillation differ.
    """

    @abc.abstractmethod
    def __call__(
        self, classifier: PyTree, distilled: DistilledSet, tilt: PyTree | None = None
    ) -> Fitted:
        """Fits the classifier to the distilled set.

        **Arguments:**

        - `classifier`: the classifier whose parameters are to be fitted; where they
            start, for solvers that need a start.
        - `distilled`: the distilled set to fit it to.
        - `tilt`: a linear term that is added to the inner loss: its inner product with
            the parameters, the floating-point arrays of the classifier, whose structure
            it has. Zero, which is as good as `None`, but that one may differentiate in
            it: minus the derivative of an outer loss is the adjoint, which tells how
            exact a hypergradient is.

        **Returns:**

        A [`eqdistill.Fitted`][], whose `classifier` may be differentiated with respect
        to every array in `distilled` and `tilt`. It is returned whether or not the
        solve succeeded: see its `converged`.
        """
