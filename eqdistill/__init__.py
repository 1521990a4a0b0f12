"""Dataset distillation in JAX and Equinox."""

# The hook below compiles anew what is first imported under it: not these, which take
# twice as long then.
import equinox  # noqa: F401
import lineax  # noqa: F401
import optax  # noqa: F401
import optimistix  # noqa: F401
import safetensors.numpy  # noqa: F401
import scipy.linalg
import scipy.special  # noqa: F401
from jaxtyping import install_import_hook


# Every argument's type and shape is checked at run time, for users too: a silent
# broadcast is the one bug that a distilled set cannot show.
with install_import_hook("eqdistill", "beartype.beartype"):
    from . import datasets as datasets, plot as plot
    from ._adjoint import DampedCG as DampedCG
    from ._argmin_solver import ArgminSolver as ArgminSolver
    from ._artifact import Artifact as Artifact, load as load, save as save
    from ._auto_solver import AutoSolver as AutoSolver
    from ._classifier import LogisticRegression as LogisticRegression
    from ._dataset import Dataset as Dataset
    from ._distill import distill as distill
    from ._distill_each import distill_each as distill_each
    from ._distillation import (
        Distillation as Distillation,
        DistillationError as DistillationError,
        History as History,
    )
    from ._distilled_set import DistilledSet as DistilledSet
    from ._evaluate import evaluate as evaluate, Evaluation as Evaluation
    from ._exact import distill_exactly as distill_exactly
    from ._export import export as export
    from ._fit import fit as fit
    from ._inner_solver import (
        AbstractInnerSolver as AbstractInnerSolver,
        Fitted as Fitted,
        inner_loss as inner_loss,
    )
    from ._losses import cross_entropy as cross_entropy
    from ._outer_loss import outer_loss as outer_loss
    from ._span_solver import SpanSolver as SpanSolver
    from ._whitened import whitened as whitened


__version__ = "0.1.0"
