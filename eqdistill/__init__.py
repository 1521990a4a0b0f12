"""Dataset distillation in JAX and Equinox."""

# Imported before the hook below, which would compile these packages again: that takes
# twice as long.
import equinox  # noqa: F401
import lineax  # noqa: F401
import optax  # noqa: F401
import optimistix  # noqa: F401
import safetensors.numpy  # noqa: F401
import scipy.linalg
import scipy.special  # noqa: F401
from jaxtyping import install_import_hook

from . import _typechecking as _typechecking


# Every argument's type and shape is checked at run time, for users too: a silent
# broadcast is the one bug that a distilled set cannot show.
with install_import_hook("eqdistill", "eqdistill._typechecking.typechecked"):
    from . import datasets as datasets, nn as nn, plot as plot, recipes as recipes
    from ._classifier import (
        Frozen as Frozen,
        HasPenalised as HasPenalised,
        last_layer as last_layer,
        LinearClassifier as LinearClassifier,
        LogisticRegression as LogisticRegression,
        parameters as parameters,
    )
    from ._data._augmentation import (
        AbstractAugmentation as AbstractAugmentation,
        augment as augment,
        Compose as Compose,
        OneOf as OneOf,
    )
    from ._data._dataset import Dataset as Dataset
    from ._data._distilled_set import DistilledSet as DistilledSet
    from ._data._frequencies import Frequencies as Frequencies
    from ._data._image_augmentations import (
        Affine as Affine,
        ColourJitter as ColourJitter,
        Crop as Crop,
        Cutout as Cutout,
        Flip as Flip,
    )
    from ._data._packed import Packed as Packed
    from ._data._preprocessing import (
        AbstractPreprocessing as AbstractPreprocessing,
        Standardisation as Standardisation,
        ZCA as ZCA,
    )
    from ._files._artifact import Artifact as Artifact, load as load
    from ._files._checkpoint import Checkpoints as Checkpoints
    from ._files._export import export as export
    from ._files._save import save as save
    from ._inner._argmin_solver import ArgminSolver as ArgminSolver
    from ._inner._auto_solver import AutoSolver as AutoSolver
    from ._inner._damped_cg import DampedCG as DampedCG
    from ._inner._fit import fit as fit
    from ._inner._inner_solver import (
        AbstractDrawingSolver as AbstractDrawingSolver,
        AbstractInnerSolver as AbstractInnerSolver,
        Fitted as Fitted,
        inner_loss as inner_loss,
    )
    from ._inner._linearised_solver import (
        Linearised as Linearised,
        LinearisedSolver as LinearisedSolver,
    )
    from ._inner._neumann_series import NeumannSeries as NeumannSeries
    from ._inner._pool import Pool as Pool, PoolState as PoolState
    from ._inner._random_features import RandomFeatures as RandomFeatures
    from ._inner._random_initialisation import (
        RandomInitialisation as RandomInitialisation,
    )
    from ._inner._relative_ridge import RelativeRidge as RelativeRidge
    from ._inner._reversible_solver import ReversibleSolver as ReversibleSolver
    from ._inner._ridge_solver import RidgeSolver as RidgeSolver
    from ._inner._span_solver import SpanSolver as SpanSolver
    from ._inner._unrolled_adjoint import (
        AbstractUnrolledAdjoint as AbstractUnrolledAdjoint,
        DirectAdjoint as DirectAdjoint,
        ForwardAdjoint as ForwardAdjoint,
        RecursiveCheckpointAdjoint as RecursiveCheckpointAdjoint,
    )
    from ._inner._unrolled_solver import UnrolledSolver as UnrolledSolver
    from ._inner._warm_lbfgs import WarmLBFGS as WarmLBFGS
    from ._inner._window import (
        AbstractWindow as AbstractWindow,
        GradientWindow as GradientWindow,
        LastSteps as LastSteps,
        RandomWindow as RandomWindow,
    )
    from ._losses import (
        AbstractLoss as AbstractLoss,
        cross_entropy as cross_entropy,
        CrossEntropy as CrossEntropy,
        SquaredError as SquaredError,
    )
    from ._outer._averaging import average_of as average_of, averaged as averaged
    from ._outer._batches import (
        BalancedBatches as BalancedBatches,
        Batches as Batches,
    )
    from ._outer._callbacks import (
        AbstractCallback as AbstractCallback,
        Best as Best,
        EarlyStopping as EarlyStopping,
        Log as Log,
        ProgressBar as ProgressBar,
    )
    from ._outer._clipping import clip_by_running_norm as clip_by_running_norm
    from ._outer._data import (
        AbstractData as AbstractData,
        FullBatch as FullBatch,
    )
    from ._outer._distill import distill as distill
    from ._outer._distill_each import distill_each as distill_each
    from ._outer._distill_state import (
        DistillState as DistillState,
        Metrics as Metrics,
    )
    from ._outer._distillation import (
        Distillation as Distillation,
        DistillationError as DistillationError,
        History as History,
    )
    from ._outer._evaluate import evaluate as evaluate, Evaluation as Evaluation
    from ._outer._exact import distill_exactly as distill_exactly
    from ._outer._hypergradient_error import (
        hypergradient_error as hypergradient_error,
        HypergradientError as HypergradientError,
    )
    from ._outer._outer_loss import Outcome as Outcome, outer_loss as outer_loss
    from ._outer._problem import Problem as Problem
    from ._outer._whitened import whitened as whitened


__version__ = "0.1.0"
