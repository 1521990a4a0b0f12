"""Dataset distillation in JAX and Equinox."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version

from jaxtyping import install_import_hook as _install_import_hook

from . import _typechecking as _typechecking


# Import these before the hook, which would compile them again and take twice as long.
for _package in ("equinox", "lineax", "optax", "optimistix", "scipy.linalg"):
    _import_module(_package)

# Every argument's type and shape is checked at run time, for users too: a silent
# broadcast is the one bug that does not show in a distilled set.
with _install_import_hook("eqdistill", "eqdistill._typechecking.typechecked"):
    from . import (
        adjoints as adjoints,
        augment as augment,
        datasets as datasets,
        linear as linear,
        nn as nn,
        plot as plot,
        recipes as recipes,
    )
    from ._cite import cite as cite
    from ._data._dataset import Dataset as Dataset
    from ._data._distilled_set import DistilledSet as DistilledSet
    from ._data._packed import Packed as Packed
    from ._data._parameterisation import (
        AbstractParameterisation as AbstractParameterisation,
    )
    from ._data._pyramid import Pyramid as Pyramid
    from ._files._checkpoint import Checkpoints as Checkpoints
    from ._files._export import export as export
    from ._files._save import load as load, save as save
    from ._inner._argmin_solver import ArgminSolver as ArgminSolver
    from ._inner._auto_solver import AutoSolver as AutoSolver
    from ._inner._fit import fit as fit
    from ._inner._inner_solver import (
        AbstractInnerSolver as AbstractInnerSolver,
        Fitted as Fitted,
        inner_loss as inner_loss,
    )
    from ._inner._unrolled_solver import UnrolledSolver as UnrolledSolver
    from ._losses import (
        AbstractLoss as AbstractLoss,
        BinaryCrossEntropy as BinaryCrossEntropy,
        CrossEntropy as CrossEntropy,
        SquaredError as SquaredError,
    )
    from ._models._models import AbstractModels as AbstractModels, Fresh as Fresh
    from ._models._pool import Pool as Pool
    from ._models._random_features import RandomFeatures as RandomFeatures
    from ._outer._batches import Batches as Batches
    from ._outer._bilevel import Bilevel as Bilevel
    from ._outer._callbacks import (
        AbstractCallback as AbstractCallback,
        EarlyStopping as EarlyStopping,
        ProgressBar as ProgressBar,
    )
    from ._outer._data import (
        AbstractData as AbstractData,
        Cached as Cached,
        FullBatch as FullBatch,
    )
    from ._outer._distill import distill as distill
    from ._outer._distillation import DistillationError as DistillationError
    from ._outer._evaluate import evaluate as evaluate
    from ._outer._in_turn import InTurn as InTurn
    from ._outer._objective import (
        AbstractObjective as AbstractObjective,
        Outcome as Outcome,
    )
    from ._outer._optimisers import averaged as averaged
    from ._outer._problem import Problem as Problem
    from ._outer._rounds import Rounds as Rounds


for _module in (adjoints, augment, datasets, linear, nn, plot, recipes):
    _typechecking.suggest_arguments(_module)
_typechecking.suggest_arguments(_import_module(__name__))

__version__ = _version("eqdistill")
