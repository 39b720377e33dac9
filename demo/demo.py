"""A demo of replicax on real data: any number of replicas of a program on any number of devices.

``make demo`` runs it on the GPUs or TPUs of this machine, or else on 8 simulated CPU devices.
``.venv/bin/python demo/demo.py --devices 3`` runs it on 3 simulated devices.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_digits

import replicax

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
Array = jax.Array | np.ndarray[Any, Any]
Batch = dict[str, Array]
Params = dict[str, jax.Array]


def main(argv: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a pipe may have an encoding without block characters
    console = Console(highlight=False)
    devices = find_devices(options.devices)
    console.print(banner(devices))
    split = show_splitting(console, devices)
    digits = load_data()
    runs = train_everywhere(console, digits, devices, options.epochs)
    check(console, runs)
    show_surprising(console, runs[-1].params, digits, devices)
    show_processes(console, digits, runs[0], options.epochs)
    console.print(
        f"\n[bold green]Shown[/]: {split} replicas split over {count(len(devices), 'device')}, one training run in "
        f"{len(runs)} layouts and in two processes with one result, and {len(digits.labels):,} images in one call, "
        f"in {time.perf_counter() - start:.1f} s."
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="replicax on real data")
    parser.add_argument("--devices", type=int, help="simulate this many devices (default: the real ones, or 8)")
    parser.add_argument("--epochs", type=int, default=40, help="how long to train (default: %(default)s)")
    return parser.parse_args(argv)


def find_devices(simulated: int | None) -> list[jax.Device]:
    """The accelerators of this machine, or simulated devices."""
    if simulated is not None:
        replicax.simulate_devices(simulated)
    else:
        # Like replicax.simulate_devices(8), but JAX still uses accelerators if it finds any.
        jax.config.update("jax_num_cpu_devices", 8)
    # By default, GPUs and TPUs multiply float32 matrices in lower precision, but losses must agree to float32 rounding.
    jax.config.update("jax_default_matmul_precision", "highest")
    return jax.devices()


def banner(devices: Sequence[jax.Device]) -> Panel:
    kind = "simulated CPU devices" if devices[0].platform == "cpu" else devices[0].device_kind
    return Panel(
        Group(
            Text("replicax.pmap runs the program of one replica for all of them, in parallel on all devices."),
            Text.assemble(
                f"JAX {jax.__version__} has {count(len(devices), 'device')} here, {kind}: ",
                *((f"{name(device)} ", colour(i)) for i, device in enumerate(devices)),
            ),
        ),
        title="replicax",
        border_style="bold",
    )


# ---------------------------------------------------------------------------------------------------------------
# 1. How replicas are split over devices


def show_splitting(console: Console, devices: Sequence[jax.Device]) -> str:
    """Shows N = D replicas, more replicas than devices, and a number that does not divide evenly."""
    console.print(Rule("[bold]1. y = replicax.pmap(lambda x: x * 2)(x)[/], for any number of replicas"))
    some = len(devices) + len(devices) // 2
    sizes = sorted({len(devices), some, some + 1})
    for size in sizes:
        show_split(console, size, devices)
    return join(sizes)


def show_split(console: Console, size: int, devices: Sequence[jax.Device]) -> None:
    x = np.arange(size, dtype=np.float32)
    double = replicax.pmap(lambda x: x * 2)
    y = double(x)
    if not np.array_equal(y, x * 2):
        fail(f"pmap(lambda x: x * 2) of {x} is {y}")
    lanes = split_of(double, x)
    where = f"{count(size, 'replica')} on {count(len(devices), 'device')}"
    console.print(f"\n[bold]{where}[/]: {in_words(lanes, size, devices)}")
    console.print(cut(lanes, x))
    in_a_row = min(len(devices), 4 if console.width < 128 else 8)
    boxes = [device_box(device, i, lanes.get(device), x) for i, device in enumerate(devices)]
    console.print(Columns(boxes, width=console.width // in_a_row - 1))
    console.print("Where the result lies:")
    replicax.show_replicas(y, "y", console=console)
    if size % len(lanes):
        console.print(f"[dim]JAX cuts an array into equal parts only, and {size} do not divide by {len(lanes)}.[/]")


def split_of(mapped: replicax.MappedFunction[Any], *args: Any) -> dict[jax.Device, range]:
    """The lanes of each device, from the compiled program. Lanes after the last replica are padding."""
    traced = mapped.trace(*args)
    where, shape = traced.lower().compile().input_shardings[0][-1], traced.jaxpr.in_avals[-1].shape
    return {device: range(*index[0].indices(shape[0])) for device, index in where.devices_indices_map(shape).items()}


def in_words(lanes: dict[jax.Device, range], size: int, devices: Sequence[jax.Device]) -> str:
    each = len(next(iter(lanes.values())))
    idle, padding = len(devices) - len(lanes), len(lanes) * each - size
    words = f"{len(lanes)} of {count(len(devices), 'device')} run{'s' if len(lanes) == 1 else ''} {each:,} each"
    if idle:
        words += f", {idle} {'is' if idle == 1 else 'are'} not needed"
    if padding:
        words += f", and {count(padding, 'spare lane')} cop{'ies' if padding == 1 else 'y'} replica {size - 1:,}"
    return words + "."


def cut(lanes: dict[jax.Device, range], x: np.ndarray[Any, Any]) -> Text:
    """The input in one line, with a bar between the parts of two devices."""
    parts = [x[lane.start : lane.stop] for lane in lanes.values()]
    texts = [Text(" ".join(f"{value:g}" for value in part), colour(i)) for i, part in enumerate(parts)]
    return Text("x = ") + Text(" │ ").join(texts)


def device_box(device: jax.Device, i: int, lane: range | None, x: np.ndarray[Any, Any]) -> Panel:
    """The input and output of one device, with padding in parentheses."""
    if lane is None:
        return Panel(Text("idle\n"), title=name(device), style="dim")

    def row(values: np.ndarray[Any, Any]) -> str:
        return " ".join(f"{values[r]:g}" if r < len(x) else f"({values[-1]:g})" for r in lane)

    return Panel(Text(f"x   {row(x)}\nx*2 {row(x * 2)}"), title=name(device), style=colour(i))


# ---------------------------------------------------------------------------------------------------------------
# 2. One training run in several layouts


@dataclass(frozen=True)
class Digits:
    """1,797 shuffled handwritten digits of 8 × 8 pixels: the first 1,400 for training, the rest held out."""

    images: Array
    labels: Array

    TRAINING, HELD_OUT = 1400, 397
    BATCH = 280  # divisible by 1, 2, 7, 8 and 20 replicas

    def batches(self, epochs: int) -> list[Batch]:
        """The batches of a whole run, in the same order for every layout."""
        rng = np.random.default_rng(1)
        orders = (rng.permutation(self.TRAINING).reshape(-1, self.BATCH) for _ in range(epochs))
        return [{"images": self.images[rows], "labels": self.labels[rows]} for order in orders for rows in order]


def load_data() -> Digits:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return Digits(images[order].astype(np.float32) / 16, labels[order].astype(np.int32))


@dataclass(frozen=True)
class Run:
    """One training run and its layout."""

    replicas: int
    devices: int
    params: Params
    losses: np.ndarray[Any, Any]
    right: int  # the number of held-out images that are classified correctly

    @property
    def accuracy(self) -> float:
        return self.right / Digits.HELD_OUT

    def __str__(self) -> str:
        return f"{count(self.replicas, 'replica')} on {count(self.devices, 'device')}"


def new_params() -> Params:
    rng = np.random.default_rng(2)
    sizes = {"hidden": (64, 64), "output": (64, 10)}
    weights = {key: rng.normal(size=size) * np.sqrt(2 / size[0]) for key, size in sizes.items()}
    biases = {f"{key} bias": np.zeros(size[1]) for key, size in sizes.items()}
    return {key: jnp.asarray(value, jnp.float32) for key, value in (weights | biases).items()}


def logits(params: Params, images: Array) -> jax.Array:
    """The scores of the ten digits, of shape ``(..., 10)`` for images of shape ``(..., 64)``."""
    hidden = jax.nn.relu(images @ params["hidden"] + params["hidden bias"])
    return hidden @ params["output"] + params["output bias"]


def loss_of(params: Params, images: Array, labels: Array) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(logits(params, images))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1))


def train_step(state: tuple[Params, Params], batch: Batch) -> tuple[tuple[Params, Params], jax.Array]:
    """The program of one replica: gradients on its part of the batch, averaged over all replicas."""
    params, velocity = state
    loss, grads = jax.value_and_grad(loss_of)(params, batch["images"], batch["labels"])
    loss, grads = jax.lax.pmean((loss, grads), "replicas")
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
    params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
    return (params, velocity), loss


def train_everywhere(console: Console, digits: Digits, devices: Sequence[jax.Device], epochs: int) -> list[Run]:
    console.print()
    console.print(Rule("[bold]2. One training run[/], on any number of devices, as any number of replicas"))
    console.print(
        f"A small network learns {Digits.TRAINING:,} handwritten digits, {Digits.BATCH} a step. A replica takes an "
        "equal share of each batch, and jax.lax.pmean averages the gradients. All layouts have to learn the same."
    )
    some = sorted({1, 2, len(devices)} & set(range(1, len(devices) + 1)))
    layouts = [(k, k) for k in some if Digits.BATCH % k == 0] + [(7, k) for k in some] + [(20, len(devices))]
    layouts = list(dict.fromkeys(layouts))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        runs = [train(progress, digits, replicas, devices[:k], epochs) for replicas, k in layouts]
    console.print(comparison(runs))
    return runs


def train(progress: Progress, digits: Digits, replicas: int, devices: Sequence[jax.Device], epochs: int) -> Run:
    # All replicas share one state: in_axes=None broadcasts it, out_axes=None returns one copy.
    step = replicax.pmap(train_step, "replicas", in_axes=(None, 0), out_axes=None, devices=devices)
    batches = digits.batches(epochs)
    label = f"{count(replicas, 'replica'):>11} on {count(len(devices), 'device'):<9}"
    task = progress.add_task(label, total=len(batches), loss=float("nan"))
    params = new_params()
    state, losses = (params, jax.tree.map(jnp.zeros_like, params)), []
    for batch in batches:
        state, loss = step(state, replicax.shard(batch, replicas, devices=devices))
        losses.append(float(loss))
        progress.update(task, advance=1, loss=losses[-1])
    params = jax.device_get(state[0])
    return Run(replicas, len(devices), params, np.asarray(losses), held_out_right(params, digits))


def held_out_right(params: Params, digits: Digits) -> int:
    guesses = np.argmax(logits(params, digits.images[Digits.TRAINING :]), axis=-1)
    return int(np.sum(guesses == digits.labels[Digits.TRAINING :]))


def deviation(run: Run, reference: Run) -> float:
    """The largest relative difference between two loss curves."""
    return float(np.max(np.abs(run.losses - reference.losses) / np.abs(reference.losses)))


def comparison(runs: Sequence[Run]) -> Table:
    table = Table(
        title="The same run in every layout",
        caption="differs by: the largest relative difference of a loss, at any step, from the first row's",
        box=box.ROUNDED,
    )
    for title in ("replicas", "devices", "images each", "final loss", "held-out accuracy", "differs by"):
        table.add_column(title, justify="right")
    for run in runs:
        numbers = f"{run.losses[-1]:.6f}", f"{run.accuracy:.2%}", f"{deviation(run, runs[0]):.0e}"
        table.add_row(str(run.replicas), str(run.devices), str(Digits.BATCH // run.replicas), *numbers)
    return table


def check(
    console: Console, runs: Sequence[Run], *, accuracy: float = 0.95, tolerance: float = 1e-4, said: bool = True
) -> None:
    """Ends the demo if a run learned too little, or differs from the first by more than rounding."""
    first = runs[0]
    for run in runs:
        if run.accuracy < accuracy:
            fail(f"{run}: the held-out accuracy is {run.accuracy:.2%}, and should be {accuracy:.0%} or more")
        if not deviation(run, first) <= tolerance:  # false for NaN too
            fail(f"{run}: the losses differ by {deviation(run, first):.0e} from those of {first}")
        if abs(run.right - first.right) > 1:  # rounding may change the class of one ambiguous image
            fail(f"{run}: the held-out accuracy is {run.accuracy:.2%}, that of {first} {first.accuracy:.2%}")
    if not said:
        return
    worst = max(deviation(run, first) for run in runs)
    console.print(f"[bold green]All {len(runs)} layouts agree[/]: the losses differ by {worst:.0e} at most.")
    console.print(f"Held-out accuracy: {min(run.accuracy for run in runs):.2%} of {Digits.HELD_OUT} images.")


# ---------------------------------------------------------------------------------------------------------------
# 3. A program for each image


def surprise(params: Params, image: Array, label: Array) -> tuple[jax.Array, jax.Array]:
    """The program of one replica: the gradient norm for one image, and the predicted digit.

    Returns:
        The gradient norm of the image's loss, divided by the mean over all images; the predicted digit.
    """
    grads = jax.grad(loss_of)(params, image, label)
    pull = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    return pull / jax.lax.pmean(pull, "images"), jnp.argmax(logits(params, image))


def show_surprising(console: Console, params: Params, digits: Digits, devices: Sequence[jax.Device]) -> None:
    console.print()
    console.print(Rule(f"[bold]3. One replica an image[/]: {len(digits.labels):,} replicas in one call"))
    in_axes, args = (None, 0, 0), (params, digits.images, digits.labels)
    mapped = replicax.pmap(surprise, "images", in_axes=in_axes)
    pull, guess = mapped(*args)
    expected, _ = jax.vmap(surprise, in_axes, axis_name="images")(*args)
    difference = float(np.max(np.abs(np.asarray(pull) - np.asarray(expected))))
    if not np.allclose(pull, expected, rtol=1e-4, atol=1e-4):
        fail(f"pmap and jax.vmap of the same program differ by {difference:.0e}")
    console.print(
        f"{in_words(split_of(mapped, *args), len(digits.labels), devices)} Each replica computes the gradient of its "
        f"own image's loss, and how the gradient's norm compares with the mean over all images. jax.vmap of the "
        f"same program says the same: they differ by {difference:.0e} at most.\n"
        "The three images that surprise the trained network most:"
    )
    top = np.argsort(-np.asarray(pull))[:3]
    shades = " .:+#" if console.options.ascii_only else " ░▒▓█"
    console.print(Columns([portrait(digits, int(i), float(pull[i]), int(guess[i]), shades) for i in top]))


def portrait(digits: Digits, i: int, pull: float, guess: int, shades: str) -> Panel:
    rows = np.round(digits.images[i].reshape(8, 8) * (len(shades) - 1)).astype(int)
    picture = "\n".join("".join(2 * shades[value] for value in row) for row in rows)
    verdict = "right" if guess == digits.labels[i] else "wrong"
    seen = "trained on" if i < Digits.TRAINING else "held out"
    words = f"written   {digits.labels[i]}\ntaken for {guess} ({verdict})\n{pull:.0f} times the mean\n{seen}"
    return Panel(Text(f"{picture}\n\n{words}"), border_style="green" if verdict == "right" else "red", expand=False)


# ---------------------------------------------------------------------------------------------------------------
# 4. Two processes

PROCESSES, DEVICES_OF_EACH = 2, 2


def show_processes(console: Console, digits: Digits, reference: Run, epochs: int) -> None:
    """Runs the training once more in two processes, as on two hosts, and compares its losses."""
    console.print()
    console.print(Rule("[bold]4. Two processes[/]: the same training, each process with its own rows"))
    with replicax.testing.processes(PROCESSES, devices=DEVICES_OF_EACH, timeout=300) as both:
        found = both.run(train_own_rows, epochs)
    for mine, losses, params in found:
        run = Run(7, PROCESSES * DEVICES_OF_EACH, params, np.asarray(losses), held_out_right(params, digits))
        console.print(
            f"Replicas {mine.start} to {mine.stop - 1} of 7: final loss {losses[-1]:.6f}, held-out accuracy "
            f"{run.accuracy:.2%}; the losses differ by {deviation(run, reference):.0e} from those of {reference}."
        )
        check(console, [reference, run], said=False)


def train_own_rows(epochs: int) -> tuple[range, list[float], Params]:
    """What each process runs. It passes only its own replicas, out of 7 of all processes."""
    mine = replicax.distributed.replicas(7)
    step = replicax.pmap(train_step, "replicas", in_axes=(None, 0), out_axes=None)
    params = new_params()
    state, losses = (params, jax.tree.map(jnp.zeros_like, params)), []
    for batch in load_data().batches(epochs):
        rows = {key: np.asarray(x).reshape(7, -1, *x.shape[1:])[mine.start : mine.stop] for key, x in batch.items()}
        state, loss = step(state, rows)
        losses.append(float(loss))
    return mine, losses, jax.device_get(state[0])


# ---------------------------------------------------------------------------------------------------------------
# Words


def fail(why: str) -> NoReturn:
    sys.exit(f"The demo failed. {why}.")


def name(device: jax.Device) -> str:
    return f"{device.platform}:{device.id}"


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def join(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


if __name__ == "__main__":
    main()
