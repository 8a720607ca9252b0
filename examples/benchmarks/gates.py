"""
Measure the cost of gates: time and memory of the gated model as ratios to the ungated model.

    python examples/benchmarks/gates.py [--shapes SmolLM2-135M] [--dtypes float32,bfloat16] [--workloads prefill,decode]

Gated and ungated model share their weights in memory and run in the same process. Weights are random. Each pass of a
formulation comes directly before or after a pass of the ungated model. A round has two passes of each model, or 32
passes of decoding, which are short. The table shows the median ratio of the rounds and the range of the middle half.
The row "ungated" compares the ungated model with itself; its distance from 1 is noise.

The limit is the ratio of bytes read in decoding, or of matmul operations in prefill and training. The limit says little
if the ungated pass is far slower than its own minimum. Memory is the peak that a pass needs. For training on a CPU,
memory is the exact size of tensors kept for the backward pass.

By default a CPU measures SmolLM2-135M. A CUDA device measures the larger shapes, and compiled decoding too, which takes
hours. A model has fewer layers if it does not fit into half of the memory. Failed measurements are reported below their
table, and the other measurements continue. Compiled prefill and training use a causal mask as a matrix, as Transformers
creates it for compiled models: --modes eager,compiled.
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
    """A measured pass over a shape."""

    shape: str
    dtype: torch.dtype
    mode: str
    workload: str
    batch_size: int
    tokens: int


@dataclass(frozen=True)
class Cost:
    """
    Cost of a formulation.

    Attributes:
        seconds: median time of a pass in seconds.
        ratios: ratio of the time to the ungated model's for each round.
        limit: limit of the ratio.
        memory: ratio of the memory to the ungated model's; None if the ungated pass needs too little to measure.
    """

    seconds: float
    ratios: list[float]
    limit: float
    memory: float | None


def compare(ungated: PreTrainedModel, name: str, case: Case, rounds: int) -> Cost:
    """Measure passes of a formulation and of the ungated model in turns."""
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
    """Measure some rounds of two new workloads; return times in seconds, and the bytes that a pass of each needs."""
    is_compiled = case.mode == "compiled"
    arguments = case.batch_size, case.tokens, is_compiled
    workload, baseline = (WORKLOADS[case.workload](measured_model, *arguments) for measured_model in (model, ungated))
    for warmed_up in (workload, baseline, workload, baseline):
        warmed_up.seconds()  # the first pass is slower
    # A new workload has another cache, so its code would be compiled again.
    count = most if is_compiled else min(workload.rounds, most)
    return [_round(workload, baseline) for _ in range(count)], (workload.memory(), baseline.memory())


def _round(workload: Workload, baseline: Workload) -> tuple[float, float]:
    """Return the mean seconds of a pass of each workload. The workloads take turns in going first."""
    seconds: dict[Workload, list[float]] = {workload: [], baseline: []}
    for number in range(2 * workload.passes):
        first, second = (workload, baseline) if number % 2 else (baseline, workload)
        for timed in (first, second):
            seconds[timed].append(timed.seconds())
    return statistics.fmean(seconds[workload]), statistics.fmean(seconds[baseline])


def layers_that_fit(case: Case, device: torch.device) -> int:
    """Return the number of layers that leaves half of the memory free, with two optimizers in training."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    copies = 7 if case.workload == "training" else 1
    budget = free / 2 / copies / case.dtype.itemsize
    all_layers: int = SHAPES[case.shape]["num_hidden_layers"]
    config = llama_config(case.shape, 1, case.tokens)
    one_layer, two_layers = (count_parameters(llama_config(case.shape, layers, case.tokens)) for layers in (1, 2))
    caches = 0
    if case.workload == "decode":  # keys and values of both models
        caches = 2 * 2 * case.batch_size * case.tokens * (config.num_key_value_heads or 0) * (config.head_dim or 0)
    return max(0, min(all_layers, int((budget - one_layer - caches) / (two_layers - one_layer + caches)) + 1))


def measure(case: Case, layers: int, names: Sequence[str], rounds: int, device: torch.device) -> dict[str, Cost | str]:
    """Return the cost of each formulation, or the error of a failed measurement in one line."""
    costs: dict[str, Cost | str] = {}
    ungated = None
    for name in (progress := tqdm(names, desc=f"{case.shape} {case.mode} {case.workload}", leave=False)):
        progress.set_postfix_str(name)
        try:
            if ungated is None:
                ungated = ungated_model(llama_config(case.shape, layers, case.tokens + 64), case.dtype, device)
            costs[name] = compare(ungated, name, case, rounds)
        except Exception as error:  # any error: results of other tables must not be lost
            first_line = str(error).strip().partition("\n")[0]
            costs[name] = f"{type(error).__name__}: {first_line}"
        free_memory(device)  # tensors that the error kept alive
    return costs


def free_memory(device: torch.device) -> None:
    """Drop compiled code and cached memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cases(
    device: torch.device, shapes: Sequence[str], dtypes: Sequence[str], modes: Sequence[str], workloads: Sequence[str]
) -> Iterator[Case]:
    """
    Yield the cases: 512 tokens on a CPU, 4096 on a CUDA device, with decoding of 32 sequences too.

    Without modes all cases are eager. Compiled decoding follows on a CUDA device.
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
    """
    Return the names in a comma-separated option.

    Raises:
        SystemExit: if a name is unknown.
    """
    chosen_names = names.split(",")
    for name in chosen_names:
        if name not in known:
            sys.exit(f"error: {option} must be among {', '.join(known)}, got {name}")
    return chosen_names


def main(
    shapes: Annotated[str, typer.Option(help="Model shapes. Default: SmolLM2-135M on a CPU, all others on CUDA.")] = "",
    dtypes: Annotated[str, typer.Option(help="Dtypes. Default: float32,bfloat16 on a CPU, bfloat16 on CUDA.")] = "",
    modes: Annotated[str, typer.Option(help="eager or compiled. Default: eager, and compiled decoding on CUDA.")] = "",
    workloads: Annotated[
        str, typer.Option(help=f"Passes, separated by commas: {', '.join(WORKLOADS)}.", show_default="all")
    ] = ",".join(WORKLOADS),
    formulations: Annotated[
        str,
        typer.Option(help=f"Gate formulations, separated by commas: {', '.join(FORMULATIONS)}.", show_default="all"),
    ] = ",".join(FORMULATIONS),
    rounds: Annotated[int, typer.Option(min=3, help="Rounds per ratio.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or a CUDA device. Default: cuda if available, otherwise cpu.")] = "",
    output: Annotated[Path, typer.Option(help="Markdown file for the tables.")] = Path("build/benchmark.md"),
) -> None:
    """Print a table for each shape, dtype, mode and workload."""
    if device and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        sys.exit(f"error: --device must be cpu, cuda or cuda:N, got {device}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"error: --device must be available, got {device}, but torch finds no CUDA device; use --device cpu")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cuda = where.type == "cuda"
    if where.index is not None:
        torch.cuda.set_device(where)  # memory functions use the current device
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
            free_memory(where)  # of the previous case
            # Eager and compiled cases have the same number of layers.
            layers = sizes.setdefault(replace(case, mode=""), layers_that_fit(case, where))
            costs = measure(case, layers, names, rounds, where) if layers else {}
            known = [cost for cost in costs.values() if isinstance(cost, Cost)]
            failed = [f"{name}: {cost}" for name, cost in costs.items() if isinstance(cost, str)]
            seconds = [cost.seconds / statistics.median(cost.ratios) for cost in known] or [math.nan]
            for console in consoles:
                console.print(title_of(case, layers, statistics.median(seconds)))
                console.print(table_of(costs) if costs else "skipped: a single layer does not fit into memory")
                for line in failed:
                    console.print(line, markup=False, soft_wrap=True)
            file.flush()
            complete &= layers > 0 and not failed
    if not complete:
        sys.exit(f"error: some measurements failed; see {output}")


if __name__ == "__main__":
    typer.run(main)
