"""Times this package against other programs and against the limits of the machine.

The problem is that of JAXopt's dataset-distillation notebook, on all of MNIST. Three
programs solve it from the same start to the same outer loss of 0.632: the notebook's; a
direct one in plain JAX, Optimistix and Optax; and this package's, with the same outer
steps as the second, with a line search, and with `eqdistill.linear.whitened`, which
takes fewer steps. Then one outer value-and-gradient is timed, and compared with its
limits on this machine: reading the data once for each of the two products, and the
arithmetic at the speed of a large matrix product. Last come the parts of an outer step,
and larger inner problems.

Prints Markdown tables of medians, and writes `speed.json` and `speed.png`. Run it with
`python tests/benchmarks/speed.py`.
"""

import contextlib
import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import optimistix as optx
from _timing import in_turn, machine, parser, seconds, write
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jaxtyping import Array
from matplotlib.figure import Figure

import eqdistill as eqd


warnings.simplefilter("ignore", DeprecationWarning)
from jaxopt import GradientDescent, objective  # noqa: E402


TARGET = 0.632


class Notebook:
    """The notebook's cells, except for loading the data."""

    def __init__(self, train: eqd.Dataset, start: eqd.DistilledSet):
        images_train = train.floating().reshape(-1, 28 * 28)
        labels_train = train.labels
        params = jnp.ones((28 * 28, 10))
        l2reg = 1e-1
        gd = GradientDescent(objective.l2_multiclass_logreg, tol=1e-3, maxiter=500)
        distilled_labels = jnp.arange(10)

        def outer_loss(img):
            inner_sol = gd.run(params, l2reg, (img, distilled_labels)).params
            return objective.l2_multiclass_logreg(
                inner_sol, 0, (images_train, labels_train)
            )

        self.fun = outer_loss
        self.start = start.images.reshape(10, -1)

    def run(self, steps: int) -> Callable[[], Array]:
        gd_outer = GradientDescent(fun=self.fun, tol=1e-3, maxiter=steps)
        return lambda: gd_outer.run(self.start).params


class PlainJax:
    """The same problem in plain JAX, Optimistix and Optax."""

    def __init__(self, train: eqd.Dataset, start: eqd.DistilledSet):
        images_train = train.floating().reshape(-1, 28 * 28)
        labels_train = train.labels
        self.start = start.images.reshape(10, -1)

        def inner_loss(w, images):
            logits = images @ w
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, jnp.arange(10)
            )
            return jnp.mean(losses) + 0.05 * jnp.sum(w**2)

        def outer_loss(images, images_train, labels_train):
            w = optx.minimise(
                inner_loss,
                optx.LBFGS(rtol=1e-5, atol=1e-6),
                jnp.zeros((28 * 28, 10)),
                images,
                # The default forms a matrix of 7,840 x 7,840, and `lx.CG` breaks down
                # in single precision.
                adjoint=optx.ImplicitAdjoint(lx.BiCGStab(rtol=1e-3, atol=1e-3)),
                max_steps=500,
                throw=False,
            ).value
            logits = images_train @ w
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, labels_train
            )
            return jnp.mean(losses)

        self.value_and_grad = jax.jit(jax.value_and_grad(outer_loss))
        self.data = (images_train, labels_train)

    def run(self, steps: int) -> Callable[[], Array]:
        optimiser = optax.lbfgs(learning_rate=1.0, linesearch=None)

        @jax.jit
        def program(images, *data):
            def step(carry, _):
                images, state = carry
                loss, gradient = self.value_and_grad(images, *data)
                updates, state = optimiser.update(
                    gradient, state, images, value=loss, grad=gradient
                )
                return (optax.apply_updates(images, updates), state), None

            init = (images, optimiser.init(images))
            return jax.lax.scan(step, init, length=steps)[0][0]

        return lambda: program(self.start, *self.data)


class Eqdistill:
    def __init__(
        self,
        train: eqd.Dataset,
        start: eqd.DistilledSet,
        *,
        line_search: bool = False,
        whitened: bool = False,
    ):
        self.train, self.start = train, start
        self.model = eqd.linear.LogisticRegression(28 * 28, 10)
        self.lbfgs = optax.lbfgs(learning_rate=1.0, linesearch=None)
        if line_search:
            self.lbfgs = optax.lbfgs()
        self.whitened = whitened
        self.optimiser = (
            eqd.linear.whitened(self.lbfgs, train) if whitened else self.lbfgs
        )

    def distill(self, steps: int):
        if self.whitened:
            # A program would call this once. The result is not used, because another
            # optimiser would be compiled again.
            eqd.linear.whitened(self.lbfgs, self.train)
        return eqd.distill(
            self.start, self.model, self.train, optimiser=self.optimiser, steps=steps
        )

    def run(self, steps: int) -> Callable[[], Array]:
        return lambda: self.distill(steps).distilled.images.reshape(10, -1)


@contextlib.contextmanager
def compilation_cache():
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        reset_cache()
        yield
        jax.config.update("jax_compilation_cache_dir", None)
        reset_cache()


def to_the_target(train, start, repeats):
    """Seconds to the target: with compiling, with loading compiled programs from JAX's
    persistent cache, and run only."""
    objective = eqd.Bilevel(eqd.linear.LogisticRegression(28 * 28, 10))
    data, state = objective.layout(train), objective.init(start, key=jr.key(0))

    @eqx.filter_jit
    def loss(images):
        images = images.reshape(10, 28, 28)
        distilled = eqx.tree_at(lambda d: d.images, start, images)
        return objective(distilled, data, state, step=jnp.array(0), key=jr.key(0))[0]

    programs = {
        "the notebook, JAXopt": Notebook(train, start),
        "plain JAX and Optimistix": PlainJax(train, start),
        "eqdistill, the same steps": Eqdistill(train, start),
        "eqdistill, with a line search": Eqdistill(train, start, line_search=True),
        "eqdistill, whitened": Eqdistill(train, start, whitened=True),
    }
    runs, from_cache, steps, losses = {}, {}, {}, {}
    for name, program in programs.items():
        # Bisects for the smallest number of steps: each number compiles a program.
        low, high = (16, 32) if isinstance(program, Notebook) else (5, 20)
        while low < high:
            middle = (low + high) // 2
            if loss(program.run(middle)()) <= TARGET:
                high = middle
            else:
                low = middle + 1
        steps[name] = high
        runs[name] = program.run(high)
        with compilation_cache():
            for _ in range(2):
                jax.clear_caches()
                from_cache[name] = seconds(runs[name])
        losses[name] = float(loss(runs[name]()))
    with_compile = {name: [] for name in programs}
    for _ in range(repeats):
        for name in programs:
            jax.clear_caches()
            with_compile[name].append(seconds(runs[name]))
    times = in_turn(runs, repeats)
    print(f"To an outer loss of {TARGET}, medians of {repeats} runs:\n")
    kinds = ("with compile", "from cache", "run only")
    print("| program | steps | loss |", " | ".join(kinds), "| ratios |")
    print("|---|---|---|---|---|---|---|")
    rows = {}
    for name in programs:
        rows[name] = {
            "steps": steps[name],
            "loss": losses[name],
            "with compile": float(np.median(with_compile[name])),
            "from cache": from_cache[name],
            "run only": float(np.median(times[name])),
        }
        first = next(iter(rows.values()))
        # The data are constants of the notebook's program, and are cached with it.
        ratios = [first[k] / rows[name][k] for k in ("with compile", "run only")]
        rows[name]["ratios"] = ratios
        print(
            f"| {name} | {steps[name]} | {losses[name]:.4f} "
            f"| {rows[name]['with compile']:.1f} s | {from_cache[name]:.1f} s "
            f"| {rows[name]['run only']:.2f} s | {ratios[0]:.1f}, {ratios[1]:.1f} |"
        )
    return rows


def one_gradient(train, start, repeats):
    """Milliseconds of one outer value-and-gradient, and its limits."""
    objective = eqd.Bilevel(eqd.linear.LogisticRegression(28 * 28, 10))
    state = objective.init(start, key=jr.key(0))
    plain = PlainJax(train, start)
    images, labels = plain.data

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def hypergradient(start, data):
        return objective(start, data, state, step=jnp.array(0), key=jr.key(0))[0]

    full, own = eqd.FullBatch(train), objective.layout(train)
    total = jax.jit(jnp.sum)
    square = jr.normal(jr.key(0), (2048, 2048))
    multiply = jax.jit(jnp.matmul)
    runs = {
        "plain JAX and Optimistix": lambda: plain.value_and_grad(
            plain.start, images, labels
        ),
        "`Bilevel` on a `FullBatch`": lambda: hypergradient(start, full),
        "`Bilevel` on its own layout of the data": lambda: hypergradient(start, own),
        "reading the data": lambda: total(images),
        "a product of matrices": lambda: multiply(square, square),
    }
    times = {k: 1e3 * np.median(v) for k, v in in_turn(runs, repeats).items()}
    flops = 4 * images.size * 10
    speed = 2 * 2048**3 / times.pop("a product of matrices")
    arithmetic = flops / speed
    read = times.pop("reading the data")
    limit = max(2 * read, arithmetic)
    print(f"\nOne outer value-and-gradient, medians of {repeats} runs:\n")
    print("| program | ms | of the limit |")
    print("|---|---|---|")
    for name, value in times.items():
        print(f"| {name} | {value:.1f} | {value / limit:.1f} |")
    print(f"| reading the data twice | {2 * read:.1f} | {2 * read / limit:.1f} |")
    print(
        f"| {flops / 1e9:.1f} GFLOP at {speed / 1e6:.0f} GFLOP/s | {arithmetic:.1f} "
        f"| {arithmetic / limit:.1f} |"
    )
    return {**times, "read twice": 2 * read, "arithmetic": arithmetic}


@eqx.filter_jit
def step_gradient(problem, state, data):
    """The loss of a step, its outcome, and its gradient."""

    def loss(learned):
        moved = eqx.tree_at(lambda s: s.learned, state, learned)
        start, objective = problem.pair(moved)
        args = start.decode(), data, state.objective_state
        return objective(*args, step=state.step, key=state.key)

    return jax.value_and_grad(loss, has_aux=True)(state.learned)


def one_step(train, start, repeats):
    """Milliseconds of an outer step of `distill`, and of its hypergradient alone. The
    rest is the optimiser, the checks of the step, and the loop."""
    network = eqx.nn.Sequential(
        [
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.MLP(28 * 28, 10, 32, 1, activation=jax.nn.softplus, key=jr.key(0)),
        ]
    )
    few = eqd.Dataset(train.images[:10_000], train.labels[:10_000], 10)
    strong = eqd.DistilledSet.from_noise(train, l2=0.01, scale=0.3, key=jr.key(0))
    steps = 20
    problems = {
        "logistic regression, L-BFGS": eqd.Problem(
            start,
            eqd.Bilevel(eqd.linear.LogisticRegression(28 * 28, 10)),
            optimiser=optax.lbfgs(learning_rate=1.0, linesearch=None),
        ),
        "perceptron, Adam": eqd.Problem(
            strong, eqd.Bilevel(network), optimiser=optax.adam(0.001)
        ),
    }
    print(f"\nAn outer step, medians of {repeats} runs of {steps} steps:\n")
    print("| problem | step, ms | hypergradient alone, ms | outside of it |")
    print("|---|---|---|---|")
    rows = {}
    for (name, problem), real in zip(problems.items(), (train, few), strict=True):
        state = problem.init(key=jr.key(0))
        data = problem.objective.layout(real)
        # As in a run, the inner solver starts from the last fit.
        (_, outcome), _ = step_gradient(problem, state, data)
        state = eqx.tree_at(lambda s: s.objective_state, state, outcome.state)

        def run(num_steps, problem=problem, data=data):
            args = problem.start, problem.objective, data
            result = eqd.distill(*args, optimiser=problem.optimiser, steps=num_steps)
            return result.distilled.images

        args = problem, state, data

        def alone(args=args):
            for _ in range(steps):
                jax.block_until_ready(step_gradient(*args))

        # The difference of two runs excludes what happens once.
        runs = {"few": lambda: run(10), "many": lambda: run(10 + steps), "alone": alone}
        times = in_turn(runs, repeats)
        each = 1e3 * np.median(times["many"] - times["few"]) / steps
        gradient = 1e3 * np.median(times["alone"]) / steps
        rows[name] = {"step": float(each), "hypergradient": float(gradient)}
        outside = (each - gradient) / each
        print(f"| {name} | {each:.2f} | {gradient:.2f} | {outside:.1%} |")
    return rows


class FromZero(eqd.AbstractInnerSolver[None]):
    """`SpanSolver`, but each fit starts from zero."""

    def init(self, distilled, model, *, key):
        return None

    def __call__(self, distilled, model, state, *, key):
        head = jax.tree.map(jnp.zeros_like, model.head)
        fitted, _ = eqd.linear.SpanSolver()(distilled, model, head, key=key)
        return fitted, state


def inner_solves(train, repeats):
    """Milliseconds of an outer step of Adam from real images, for several inner
    solvers."""
    model = eqd.linear.LogisticRegression(28 * 28, 10)
    optimiser = optax.adam(0.02)
    kinds = {
        "from zero": FromZero(),
        "from the last fit": eqd.linear.SpanSolver(),
        "L-BFGS": eqd.ArgminSolver(eqd.adjoints.WarmLBFGS(warm_up=0)),
    }
    print("\nInner solves, of 12 outer steps:\n")
    print("| images | inner solves | ms | ratio |")
    print("|---|---|---|---|")
    rows = {}
    data = eqd.Bilevel(model).layout(train)
    for n in (10, 50, 100, 200, 500, 1000):
        start = eqd.DistilledSet.from_real(train, n, l2=0.001, key=jr.key(0))

        def run(kind, steps, start=start):
            objective = eqd.Bilevel(model, kinds[kind])
            return eqd.distill(start, objective, data, optimiser=optimiser, steps=steps)

        runs = {
            (kind, steps): functools.partial(run, kind, steps)
            for kind in kinds
            for steps in (2, 14)
        }
        times = in_turn(runs, repeats)
        for kind in kinds:
            each = 1e3 * np.median(times[kind, 14] - times[kind, 2]) / 12
            rows[f"{n} {kind}"] = float(each)
            ratio = rows[f"{n} from zero"] / each
            print(f"| {n} | {kind} | {each:.1f} | {ratio:.1f} |")
    return rows


def draw(rows, gradient) -> Figure:
    figure = Figure(figsize=(7.0, 2.2), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(rows)
    bars = left.barh(names, [rows[k]["run only"] for k in names], color="0.5")
    left.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)
    left.set_xlabel(f"seconds to an outer loss of {TARGET}", fontsize=8)
    names = [k.replace("`", "") for k in gradient]
    bars = right.barh(names, list(gradient.values()), color="0.5")
    right.bar_label(bars, fmt="%.1f", fontsize=6, padding=2)
    right.set_xlabel("one outer value-and-gradient (ms)", fontsize=8)
    for axis in (left, right):
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main(repeats: int, output: Path) -> None:
    train, _ = eqd.datasets.load("mnist")
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=1 / 784, key=jr.key(0))
    results: dict[str, object] = {"machine": machine()}
    rows = to_the_target(train, start, repeats)
    results["target"] = rows
    gradient = one_gradient(train, start, 5 * repeats)
    results["gradient"] = gradient
    results["step"] = one_step(train, start, repeats)
    results["inner solves"] = inner_solves(train, repeats)
    write(results, output / "speed.json")
    draw(rows, gradient).savefig(output / "speed.png")


if __name__ == "__main__":
    main(**vars(parser(__doc__, repeats=5).parse_args()))
