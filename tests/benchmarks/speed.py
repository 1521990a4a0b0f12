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

import tempfile
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import optimistix as optx
from _timing import in_turn, machine, parser, print_table, seconds, write
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from matplotlib.figure import Figure

import eqdistill as eqd


warnings.simplefilter("ignore", DeprecationWarning)
from jaxopt import GradientDescent, objective as jaxopt_objective  # noqa: E402


TARGET = 0.632
MODEL = eqd.linear.LogisticRegression(28 * 28, 10)
LBFGS = optax.lbfgs(learning_rate=1.0, linesearch=None)


def vectors(train):
    return train.floating().reshape(-1, 28 * 28), train.labels


# Each program is a function from the number of steps to a function that runs them.


def notebook(train, start):
    """The notebook's cells, except for loading the data."""
    data_train = vectors(train)
    params = jnp.ones((28 * 28, 10))
    gd = GradientDescent(jaxopt_objective.l2_multiclass_logreg, tol=1e-3, maxiter=500)

    def outer_loss(img):
        inner_sol = gd.run(params, 1e-1, (img, jnp.arange(10))).params
        return jaxopt_objective.l2_multiclass_logreg(inner_sol, 0, data_train)

    def run(steps):
        gd_outer = GradientDescent(fun=outer_loss, tol=1e-3, maxiter=steps)
        return lambda: gd_outer.run(start.images.reshape(10, -1)).params

    return run


def cross_entropy(w, images, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(images @ w, labels))


@jax.jit
@jax.value_and_grad
def plain_gradient(images, images_train, labels_train):
    """The loss in plain JAX and Optimistix, and its gradient."""

    def inner_loss(w, images):
        return cross_entropy(w, images, jnp.arange(10)) + 0.05 * jnp.sum(w**2)

    w = optx.minimise(
        inner_loss,
        optx.LBFGS(rtol=1e-5, atol=1e-6),
        jnp.zeros((28 * 28, 10)),
        images,
        # The default forms a matrix of 7,840 x 7,840, and `lx.CG` breaks down in single
        # precision.
        adjoint=optx.ImplicitAdjoint(lx.BiCGStab(rtol=1e-3, atol=1e-3)),
        max_steps=500,
        throw=False,
    ).value
    return cross_entropy(w, images_train, labels_train)


def plain_jax(train, start):
    data = vectors(train)

    def run(steps):
        @jax.jit
        def program(images, *data):
            def step(carry, _):
                images, state = carry
                loss, gradient = plain_gradient(images, *data)
                updates, state = LBFGS.update(
                    gradient, state, images, value=loss, grad=gradient
                )
                return (optax.apply_updates(images, updates), state), None

            init = (images, LBFGS.init(images))
            return jax.lax.scan(step, init, length=steps)[0][0]

        return lambda: program(start.images.reshape(10, -1), *data)

    return run


def eqdistill(train, start, optimiser, whiten=False):
    used = eqd.linear.whitened(optimiser, train) if whiten else optimiser

    def distill(steps):
        if whiten:
            # A program would call this once. The result is not used, because another
            # optimiser would be compiled again.
            eqd.linear.whitened(optimiser, train)
        return eqd.distill(start, MODEL, train, optimiser=used, steps=steps)

    return lambda steps: lambda: distill(steps).distilled.images


@eqx.filter_jit
def hypergradient(images, start, objective, data, state):
    """The loss of a step, its outcome, and its gradient in the images."""

    def loss(images):
        images = images.reshape(start.images.shape)
        distilled = eqx.tree_at(lambda d: d.images, start, images)
        return objective(distilled, data, state, step=jnp.array(0), key=jr.key(0))

    return jax.value_and_grad(loss, has_aux=True)(images)


def from_cache(run):
    """Seconds with compiled programs from JAX's persistent cache."""
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        reset_cache()
        for _ in range(2):
            jax.clear_caches()
            time = seconds(run)
        jax.config.update("jax_compilation_cache_dir", None)
        reset_cache()
    return time  # pyright: ignore[reportPossiblyUnboundVariable]


def to_the_target(train, start, repeats):
    """Seconds to the target: with compiling, with loading compiled programs from JAX's
    persistent cache, and run only."""
    objective = eqd.Bilevel(MODEL)
    problem = start, objective, objective.layout(train)
    state = objective.init(start, key=jr.key(0))
    loss = lambda run: float(hypergradient(run(), *problem, state)[0][0])
    programs = {
        "the notebook, JAXopt": notebook(train, start),
        "plain JAX and Optimistix": plain_jax(train, start),
        "eqdistill, the same steps": eqdistill(train, start, LBFGS),
        "eqdistill, with a line search": eqdistill(train, start, optax.lbfgs()),
        "eqdistill, whitened": eqdistill(train, start, LBFGS, whiten=True),
    }
    runs, rows = {}, {}
    for name, program in programs.items():
        # Bisects for the smallest number of steps: each number compiles a program.
        low, high = (5, 20) if rows else (16, 32)
        while low < high:
            middle = (low + high) // 2
            if loss(program(middle)) <= TARGET:
                high = middle
            else:
                low = middle + 1
        runs[name] = program(high)
        rows[name] = {"steps": high, "from cache": from_cache(runs[name])}
        rows[name]["loss"] = loss(runs[name])
    with_compile = {name: [] for name in programs}
    for _ in range(repeats):
        for name in programs:
            jax.clear_caches()
            with_compile[name].append(seconds(runs[name]))
    times = in_turn(runs, repeats)
    table = []
    for name, row in rows.items():
        row["with compile"] = float(np.median(with_compile[name]))
        row["run only"] = float(np.median(times[name]))
        first = next(iter(rows.values()))
        # The data are constants of the notebook's program, and are cached with it.
        row["ratios"] = [first[k] / row[k] for k in ("with compile", "run only")]
        compiled = f"{row['with compile']:.1f} s", f"{row['from cache']:.1f} s"
        ratios = ", ".join(f"{x:.1f}" for x in row["ratios"])
        last = *compiled, f"{row['run only']:.2f} s", ratios
        table.append([name, row["steps"], f"{row['loss']:.4f}", *last])
    print(f"To an outer loss of {TARGET}, medians of {repeats} runs:")
    kinds = "with compile", "from cache", "run only"
    print_table(["program", "steps", "loss", *kinds, "ratios"], table)
    return rows


def one_gradient(train, start, repeats):
    """Milliseconds of one outer value-and-gradient, and its limits."""
    objective = eqd.Bilevel(MODEL)
    state = objective.init(start, key=jr.key(0))
    full, own = eqd.FullBatch(train), objective.layout(train)
    ours = lambda data: hypergradient(start.images, start, objective, data, state)
    data = vectors(train)
    total, multiply = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    square = jr.normal(jr.key(0), (2048, 2048))
    runs = {
        "plain JAX and Optimistix": lambda: plain_gradient(
            start.images.reshape(10, -1), *data
        ),
        "`Bilevel` on a `FullBatch`": lambda: ours(full),
        "`Bilevel` on its own layout of the data": lambda: ours(own),
        "reading the data twice": lambda: total(data[0]),
        "": lambda: multiply(square, square),
    }
    times = {k: 1e3 * np.median(v) for k, v in in_turn(runs, repeats).items()}
    times["reading the data twice"] *= 2
    flops = 4 * data[0].size * 10
    speed = 2 * 2048**3 / times.pop("")
    arithmetic = f"{flops / 1e9:.1f} GFLOP at {speed / 1e6:.0f} GFLOP/s"
    times[arithmetic] = flops / speed
    limit = max(times["reading the data twice"], times[arithmetic])
    print(f"One outer value-and-gradient, medians of {repeats} runs:")
    rows = [[k, f"{x:.1f}", f"{x / limit:.1f}"] for k, x in times.items()]
    print_table(["program", "ms", "of the limit"], rows)
    return times


def one_step(train, start, repeats):
    """Milliseconds of an outer step of `distill`, and of its hypergradient alone. The
    rest is the optimiser, the checks of the step, and the loop."""
    mlp = eqx.nn.MLP(28 * 28, 10, 32, 1, activation=jax.nn.softplus, key=jr.key(0))
    network = eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), mlp])
    few = eqd.Dataset(train.images[:10_000], train.labels[:10_000], 10)
    strong = eqd.DistilledSet.from_noise(train, l2=0.01, scale=0.3, key=jr.key(0))
    steps = 20
    problems = {
        "logistic regression, L-BFGS": (start, eqd.Bilevel(MODEL), train, LBFGS),
        "perceptron, Adam": (strong, eqd.Bilevel(network), few, optax.adam(0.001)),
    }
    rows = {}
    for name, (start, objective, real, optimiser) in problems.items():
        args = start, objective, objective.layout(real)
        # As in a run, the inner solver starts from the last fit.
        state = objective.init(start, key=jr.key(0))
        (_, outcome), _ = hypergradient(start.images, *args, state)

        def run(num_steps, args=args, optimiser=optimiser):
            result = eqd.distill(*args, optimiser=optimiser, steps=num_steps)
            return result.distilled.images

        def alone(images=start.images, args=args, state=outcome.state):
            for _ in range(steps):
                jax.block_until_ready(hypergradient(images, *args, state)[0][0])

        # The difference of two runs excludes what happens once.
        runs = {"few": lambda: run(10), "many": lambda: run(10 + steps), "alone": alone}
        times = in_turn(runs, repeats)
        each = 1e3 * float(np.median(times["many"] - times["few"])) / steps
        gradient = 1e3 * float(np.median(times["alone"])) / steps
        rows[name] = each, gradient, (each - gradient) / each
    print(f"An outer step, medians of {repeats} runs of {steps} steps:")
    table = [[k, f"{x:.2f}", f"{y:.2f}", f"{z:.1%}"] for k, (x, y, z) in rows.items()]
    times = "step, ms", "hypergradient alone, ms", "outside of it"
    print_table(["problem", *times], table)
    return rows


class FromZero(eqd.AbstractInnerSolver[None]):
    """`SpanSolver`, but each fit starts from zero."""

    def init(self, distilled, model, *, key):
        return None

    def __call__(self, distilled, model, state, *, key):
        head = jax.tree.map(jnp.zeros_like, model.head)
        return eqd.linear.SpanSolver()(distilled, model, head, key=key)[0], state


def inner_solves(train, repeats):
    """Milliseconds of an outer step of Adam from real images, for several inner
    solvers."""
    optimiser = optax.adam(0.02)
    kinds = {
        "from zero": FromZero(),
        "from the last fit": eqd.linear.SpanSolver(),
        "L-BFGS": eqd.ArgminSolver(),
    }
    rows, table = {}, []
    data = eqd.Bilevel(MODEL).layout(train)
    for n in (10, 50, 100, 200, 500, 1000):
        start = eqd.DistilledSet.from_real(train, n, l2=0.001, key=jr.key(0))

        def run(kind, steps, start=start):
            problem = start, eqd.Bilevel(MODEL, kinds[kind]), data
            return lambda: eqd.distill(*problem, optimiser=optimiser, steps=steps)

        runs = {(kind, steps): run(kind, steps) for kind in kinds for steps in (2, 14)}
        times = in_turn(runs, repeats)
        for kind in kinds:
            each = 1e3 * float(np.median(times[kind, 14] - times[kind, 2])) / 12
            rows[f"{n} {kind}"] = each
            ratio = rows[f"{n} from zero"] / each
            table.append([n, kind, f"{each:.1f}", f"{ratio:.1f}"])
    print("Inner solves, of 12 outer steps:")
    print_table(["images", "inner solves", "ms", "ratio"], table)
    return rows


def draw(rows, gradient) -> Figure:
    figure = Figure(figsize=(7.0, 2.2), dpi=200, layout="constrained")
    seconds = {k: row["run only"] for k, row in rows.items()}
    gradient = {k.replace("`", ""): x for k, x in gradient.items()}
    for axis, times, number, label in zip(
        figure.subplots(1, 2),
        (seconds, gradient),
        ("%.2f", "%.1f"),
        (f"seconds to an outer loss of {TARGET}", "one outer value-and-gradient (ms)"),
        strict=True,
    ):
        bars = axis.barh(list(times), list(times.values()), color="0.5")
        axis.bar_label(bars, fmt=number, fontsize=6, padding=2)
        axis.set_xlabel(label, fontsize=8)
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main(repeats: int, output: Path) -> None:
    train, _ = eqd.datasets.load("mnist")
    start = eqd.DistilledSet.from_noise(train, l2=0.1, scale=1 / 784, key=jr.key(0))
    results: dict[str, object] = {"machine": machine()}
    results["target"] = rows = to_the_target(train, start, repeats)
    results["gradient"] = gradient = one_gradient(train, start, 5 * repeats)
    results["step"] = one_step(train, start, repeats)
    results["inner solves"] = inner_solves(train, repeats)
    write(results, output / "speed.json")
    draw(rows, gradient).savefig(output / "speed.png")


if __name__ == "__main__":
    main(**vars(parser(__doc__, repeats=5).parse_args()))
