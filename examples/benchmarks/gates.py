"""
What gates cost: time and memory of the gated model as ratios to the ungated one.

    python examples/benchmarks/gates.py [--shapes SmolLM2-135M] [--dtypes float32,bfloat16] [--workloads prefill,decode]

Gated and ungated model have the same weights, in memory too, and run in one process in turns: each pass of a
formulation comes right before or after one of the ungated model's. A round has two passes of either, or 32 of decoding,
which are short; the median of the rounds' ratios is shown, with the range that the middle half of them is in. Weights
are random. The row "ungated" compares the ungated model with itself: what it differs from 1 by is noise. Beside each
ratio stands the limit: the bytes that are read in decoding, or the operations of the matrix products in prefill and
training, with the gates and without; it says little where the ungated pass is far from its own least. Memory is the
peak of what a pass needs; of training on a CPU, exactly, what is kept for the backward pass.

Without options it measures what fits the machine: SmolLM2-135M on a CPU, the larger shapes on a CUDA device, where it
takes hours, and decoding compiled, too. Where a model doesn't fit in half of the memory, it has fewer layers. What
cannot be measured is a line in its table, and the rest goes on. Compiled prefill and training are of a causal mask that
is a matrix, as Transformers makes it then: --modes eager,compiled.
"""

import gc
import itertools
import math
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import psutil
import torch
import transformers
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from examples, if run by its path

from examples.benchmarks.gate_formulations import PEERS
from examples.benchmarks.workloads import (
    OURS,
    SHAPES,
    WORKLOADS,
    Workload,
    count_parameters,
    gated_model,
    limit,
    llama_config,
    ungated_model,
)


FORMULATIONS = ("ungated", *OURS, *PEERS)
MODES = ("eager", "compiled")


@dataclass(frozen=True)
class Case:
    """What is measured: a pass over a shape."""

    shape: str
    dtype: torch.dtype
    mode: str
    workload: str
    batch_size: int
    tokens: int


@dataclass(frozen=True)
class Cost:
    """
    Of a formulation: the median seconds; the ratios to the ungated model's, their limit, and the ratio of memory, None
    where the ungated model's pass needs so little that it cannot be seen.
    """

    seconds: float
    ratios: list[float]
    limit: float
    memory: float | None


def compare(ungated: PreTrainedModel, name: str, case: Case, rounds: int) -> Cost:
    """Passes of a formulation and of the ungated model in turns."""
    model = ungated if name == "ungated" else gated_model(name, ungated)
    pairs: list[tuple[float, float]] = []
    memory: list[tuple[int, int]] = []
    while (left := rounds - len(pairs)) > 0:
        new_pairs, bytes_needed = _rounds(model, ungated, case, left)
        pairs += new_pairs
        memory.append(bytes_needed)
        gc.collect()
    ratios = [seconds / of_ungated for seconds, of_ungated in pairs]
    least = limit(model, ungated, case.workload, case.batch_size, case.tokens)
    of_own, of_other = (sum(counts) for counts in zip(*memory, strict=True))
    of_memory = of_own / of_other if of_other else None
    return Cost(statistics.median(seconds for seconds, _ in pairs), ratios, least, of_memory)


def _rounds(
    model: PreTrainedModel, ungated: PreTrainedModel, case: Case, most: int
) -> tuple[list[tuple[float, float]], tuple[int, int]]:
    """Some rounds of two workloads that are there for these alone, and the bytes that a pass of either needs."""
    is_compiled = case.mode == "compiled"
    arguments = case.batch_size, case.tokens, is_compiled
    workload, baseline = (WORKLOADS[case.workload](measured_model, *arguments) for measured_model in (model, ungated))
    for warmed_up in (workload, baseline, workload, baseline):
        warmed_up.seconds()  # the first is slower
    # Compiled code is of one cache, so that another has to be compiled for.
    count = most if is_compiled else min(workload.rounds, most)
    return [_round(workload, baseline) for _ in range(count)], (workload.memory(), baseline.memory())


def _round(workload: Workload, baseline: Workload) -> tuple[float, float]:
    """Seconds of a pass of either, after one another, in turns the one and the other first."""
    seconds: dict[Workload, list[float]] = {workload: [], baseline: []}
    for number in range(2 * workload.passes):
        first, second = (workload, baseline) if number % 2 else (baseline, workload)
        for timed in (first, second):
            seconds[timed].append(timed.seconds())
    return statistics.fmean(seconds[workload]), statistics.fmean(seconds[baseline])


def layers_that_fit(case: Case, device: torch.device) -> int:
    """As many layers as leave half of the memory free, training with two optimizers."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    copies = 7 if case.workload == "training" else 1
    budget = free / 2 / copies / case.dtype.itemsize
    all_layers: int = SHAPES[case.shape]["num_hidden_layers"]
    config = llama_config(case.shape, 1, case.tokens)
    one_layer, two_layers = (count_parameters(llama_config(case.shape, layers, case.tokens)) for layers in (1, 2))
    caches = 0
    if case.workload == "decode":  # keys and values, of either model
        caches = 2 * 2 * case.batch_size * case.tokens * (config.num_key_value_heads or 0) * (config.head_dim or 0)
    return max(0, min(all_layers, int((budget - one_layer - caches) / (two_layers - one_layer + caches)) + 1))


def measure(case: Case, layers: int, names: Sequence[str], rounds: int, device: torch.device) -> dict[str, Cost | str]:
    """What each formulation costs, or in a line why that is not known."""
    costs: dict[str, Cost | str] = {}
    ungated = None
    for name in (progress := tqdm(names, desc=f"{case.shape} {case.mode} {case.workload}", leave=False)):
        progress.set_postfix_str(name)
        try:
            if ungated is None:
                ungated = ungated_model(llama_config(case.shape, layers, case.tokens + 64), case.dtype, device)
            costs[name] = compare(ungated, name, case, rounds)
        except Exception as error:  # whatever it is, hours of other tables must not be lost
            first_line = str(error).strip().partition("\n")[0]
            costs[name] = f"{type(error).__name__}: {first_line}"
        free_memory(device)  # the error had kept its tensors
    return costs


def free_memory(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cases(
    device: torch.device, shapes: Sequence[str], dtypes: Sequence[str], modes: Sequence[str], workloads: Sequence[str]
) -> Iterator[Case]:
    """
    On a CPU 512 tokens, on a CUDA device 4096, and there decoding of 32 sequences, too. Without modes all are eager,
    then on a CUDA device decoding compiled.
    """
    on_cuda = device.type == "cuda"
    tokens = 4096 if on_cuda else 512
    for mode, shape, dtype, workload in itertools.product(modes or MODES, shapes, dtypes, workloads):
        if not modes and mode == "compiled" and not (on_cuda and workload == "decode"):
            continue
        for batch_size in (1, 32) if on_cuda and workload == "decode" else (1,):
            yield Case(shape, getattr(torch, dtype), mode, workload, batch_size, tokens)


def title_of(case: Case, layers: int, ungated_seconds: float) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    return (
        f"{case.shape}, {layers} layers, {dtype}, {case.mode}, {case.workload}, {case.batch_size} x {case.tokens} "
        f"tokens: ungated {1000 * ungated_seconds:.4g} ms"
    )


def table_of(costs: dict[str, Cost | str]) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column("formulation", no_wrap=True)
    for column in ("time / ungated", "middle half", "limit", "memory / ungated"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, cost in costs.items():
        if isinstance(cost, str):
            table.add_row(name, "-", "-", "-", "-")
            continue
        low, _, high = statistics.quantiles(cost.ratios, n=4)
        middle = f"{low:.3f} - {high:.3f}"
        memory = "-" if cost.memory is None else f"{cost.memory:.3f}"
        table.add_row(name, f"{statistics.median(cost.ratios):.3f}", middle, f"{cost.limit:.3f}", memory)
    return table


def chosen(names: str, known: Sequence[str], option: str) -> list[str]:
    """The parts of a comma-separated option."""
    chosen_names = names.split(",")
    for name in chosen_names:
        if name not in known:
            sys.exit(f"error: {option} {name}: not one of {', '.join(known)}")
    return chosen_names


def main(
    shapes: Annotated[str, typer.Option(help="Default: SmolLM2-135M on a CPU, on CUDA all others.")] = "",
    dtypes: Annotated[str, typer.Option(help="Default: float32,bfloat16 on a CPU, on CUDA bfloat16.")] = "",
    modes: Annotated[str, typer.Option(help="Default: eager; on CUDA decoding compiled, too.")] = "",
    workloads: str = ",".join(WORKLOADS),
    formulations: str = ",".join(FORMULATIONS),
    rounds: Annotated[int, typer.Option(min=3)] = 15,
    device: Annotated[str, typer.Option(help="Default: cuda if there is one.")] = "",
    output: Annotated[Path, typer.Option(help="Where the tables are left.")] = Path("build/benchmark.md"),
) -> None:
    """Print one table for each shape, dtype, mode and workload."""
    if device and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        sys.exit(f"error: --device {device}: neither cpu nor cuda, cuda:0, ...")
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"error: --device {device}: torch finds no CUDA device")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cuda = where.type == "cuda"
    if where.index is not None:
        torch.cuda.set_device(where)  # of which memory is asked
    names = chosen(formulations, FORMULATIONS, "--formulations")
    wanted = list(
        cases(
            where,
            chosen(shapes or (",".join(list(SHAPES)[1:]) if on_cuda else "SmolLM2-135M"), list(SHAPES), "--shapes"),
            chosen(
                dtypes or ("bfloat16" if on_cuda else "float32,bfloat16"),
                ["float32", "bfloat16", "float16"],
                "--dtypes",
            ),
            chosen(modes, MODES, "--modes") if modes else (),
            chosen(workloads, list(WORKLOADS), "--workloads"),
        )
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file:
        consoles = Console(width=120), Console(width=120, file=file)
        hardware = torch.cuda.get_device_name(where) if on_cuda else f"CPU, {torch.get_num_threads()} threads"
        for console in consoles:
            console.print(f"{hardware}; torch {torch.__version__}, Transformers {transformers.__version__}\n")
        complete = True
        sizes: dict[Case, int] = {}
        for case in tqdm(wanted, unit="case", leave=False):
            free_memory(where)  # of the case before
            # Eager and compiled, it is the same model.
            layers = sizes.setdefault(replace(case, mode=""), layers_that_fit(case, where))
            costs = measure(case, layers, names, rounds, where) if layers else {}
            known = [cost for cost in costs.values() if isinstance(cost, Cost)]
            failed = [f"{name}: {cost}" for name, cost in costs.items() if isinstance(cost, str)]
            seconds = [cost.seconds / statistics.median(cost.ratios) for cost in known] or [math.nan]
            for console in consoles:
                console.print(title_of(case, layers, statistics.median(seconds)))
                console.print(table_of(costs) if costs else "left out, not one layer fits")
                for line in failed:
                    console.print(line, markup=False, soft_wrap=True)
            file.flush()
            complete &= layers > 0 and not failed
    if not complete:
        sys.exit(f"error: not all was measured; {output} says what")


if __name__ == "__main__":
    typer.run(main)
