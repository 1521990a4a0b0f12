import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PyTree

from .._checks import check_at_least
from .._chunks import chunk_size
from .._classifier import LinearClassifier
from .._conversions import as_int
from .._data._dataset import Dataset
from .._inner._inner_solver import stop_gradient
from .._losses import mean_loss
from .._sharding import vary_like
from .._typechecking import describe
from ._batches import Batches
from ._bilevel import Bilevel
from ._data import AbstractData
from ._objective import AbstractObjective, Outcome


class Rounds(AbstractObjective[PyTree]):
    """A bilevel objective whose outer steps come in rounds. All steps of a round share
    one network and one batch of real images. The network's features of the real images
    do not depend on the distilled images, so they are computed once per round, and the
    network is trained once per round. Only the last layer is fitted in every step.

    The larger the networks and the batch, the more this saves.

    !!! Example

        ```python
        objective = eqd.Rounds(eqd.Bilevel(eqd.Pool(make)), steps=8, examples=1024)
        result = eqd.distill(start, objective, train, learn=lambda s: s, steps=4000)
        ```
    """

    objective: Bilevel
    steps: int = eqx.field(static=True, converter=as_int)
    examples: int = eqx.field(static=True, converter=as_int)
    failures: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, objective: Bilevel, *, steps: int, examples: int):
        """**Arguments:**

        - `objective`: the objective. Its models must be an [`eqdistill.Pool`][] or
            another source of [`eqdistill.linear.LinearClassifier`][]s.

        All other arguments are keyword only.

        - `steps`: the number of outer steps in a round.
        - `examples`: the number of real examples in a round. An [`eqdistill.Dataset`][]
            that is passed to [`eqdistill.distill`][] is drawn in batches of this size.
            [`eqdistill.Batches`][] must already have this size.

        **Raises:**

        A `ValueError` if `steps` or `examples` is less than 1.
        """
        check_at_least(1, steps=steps, examples=examples)
        self.objective = objective
        self.steps = steps
        self.examples = examples
        self.failures = objective.failures

    def layout(self, dataset):
        """As in [`eqdistill.AbstractObjective`][], with batches of `examples`."""
        return Batches(dataset, self.examples)

    def init(self, distilled, *, key):
        """**Raises:** as for [`eqdistill.Bilevel`][]; and a `TypeError` if the models
        are not [`eqdistill.linear.LinearClassifier`][]s."""
        models, inner_state = self.objective.init(distilled, key=key)
        model = self.objective.models.draw(models, key=key)
        if not isinstance(model, LinearClassifier):
            raise TypeError(
                "`objective` must have models whose last layer alone is fitted, such "
                f"as `eqdistill.Pool(make)`; got {describe(model)}."
            )
        image = distilled.images[0]
        features = jax.eval_shape(model.features, image)
        features = jnp.zeros((self.examples, *features.shape), features.dtype)
        return models, inner_state, features, jnp.array(0)

    def __call__(self, distilled, data, state, *, step, key):
        """**Raises:** a `TypeError` if the data are not [`eqdistill.Batches`][] of
        `examples` on one device; and as for [`eqdistill.Bilevel`][]."""
        del step
        data = self._check(data)
        models, inner_state, features, count = state
        data_key, models_key, inner_key = jr.split(key, 3)
        # All seeds of a `vmap` are at the same step, so features are computed only in
        # the first step of a round.
        round_, place = jnp.divmod(eqxi.unvmap_max(count), self.steps)
        models_key = jr.fold_in(models_key, round_)
        model = stop_gradient(self.objective.models.draw(models, key=models_key))
        model = vary_like(model, distilled)

        def of_real():
            images, *_ = data.rows(round_, key=data_key)
            of_image = lambda x: model.features(Dataset.to_floating(x))
            of_chunk = lambda chunk: jax.vmap(of_image)(chunk)
            size = chunk_size(of_chunk, images, data.data.chunk_bytes)
            return jax.lax.map(of_image, images, batch_size=size)

        features = jax.lax.cond(place == 0, of_real, lambda: features)
        _, labels, weights = data.rows(round_, key=data_key)

        def mean(_, network):
            loss, network = network
            outputs = jax.vmap(network.head)(features)
            return mean_loss(loss, outputs, labels, weights)

        inner_key = jr.fold_in(inner_key, count)
        value, outcome = self.objective.of_model(
            distilled, data, model, mean, inner_state, key=inner_key
        )
        update = lambda: self.objective.models.update(
            models, stop_gradient(distilled), key=models_key
        )
        is_last = place == self.steps - 1
        models = jax.lax.cond(is_last, update, lambda: models)
        state = models, outcome.state, features, count + 1
        return value, Outcome(state, outcome.failure, outcome.metrics)

    def _check(self, data: AbstractData) -> Batches:
        if not isinstance(data, Batches) or data.size != self.examples:
            size = f" of {data.size}" if isinstance(data, Batches) else ""
            raise TypeError(
                f"`data` must be a `Dataset`, or `Batches` of {self.examples}, the "
                f"`examples` of `Rounds`; got {type(data).__name__}{size}."
            )
        if data.sharding is not None:
            raise TypeError(
                "`data` must be on one device for `Rounds`; they are spread over "
                f"{data.sharding.mesh.size} devices. Use the objective without "
                "`Rounds`."
            )
        return data
