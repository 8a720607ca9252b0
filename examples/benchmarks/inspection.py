"""
Measure the cost of meters: the time of a forward pass with meters as a ratio to the pass without.

    python examples/benchmarks/inspection.py [--tokens 4096] [--dtype float32] [--rounds 3] [--model FOLDER]

Each pass with meters follows a pass without. The table shows medians of the ratios. The model is SmolLM2-135M-Instruct
with gates, which make demo writes.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modeling_gated.default_text import default_text
from modeling_gated.inspection import (
    AttentionEntropy,
    EffectiveRank,
    FirstTokenAttention,
    GateScores,
    KeyValueNorms,
    MassiveActivations,
    Meter,
    QuantizationError,
    SinkRate,
    inspecting,
)


ATTENTION: tuple[type[Meter], ...] = (FirstTokenAttention, SinkRate, AttentionEntropy, KeyValueNorms, EffectiveRank)
OTHERS: tuple[type[Meter], ...] = (MassiveActivations, QuantizationError, GateScores)
KINDS = {
    "FirstTokenAttention": (FirstTokenAttention,),
    "five attention meters": ATTENTION,
    "activations and gates": OTHERS,
    "all meters": ATTENTION + OTHERS,
}


def seconds(model: PreTrainedModel, input_ids: torch.Tensor, meters: list[Meter]) -> float:
    """Return the seconds of a forward pass with meters."""
    started = time.perf_counter()
    with torch.no_grad(), inspecting(model, *meters):
        model(input_ids, use_cache=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("build/demo/SmolLM2-135M-Instruct-gated"),
        help="folder of a checkpoint (default: %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="length of the input (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="measurements per row (default: %(default)s)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    model = model.to(device)
    ids = AutoTokenizer.from_pretrained(arguments.model)(default_text(), verbose=False)["input_ids"]
    input_ids = torch.tensor([ids[: arguments.tokens]], device=device)

    plain: list[float] = []
    ratios_by_kind: dict[str, list[float]] = {name: [] for name in KINDS}
    seconds(model, input_ids, [])
    for name in tqdm(list(KINDS) * arguments.rounds, desc="passes"):
        plain.append(seconds(model, input_ids, []))
        ratios_by_kind[name].append(seconds(model, input_ids, [meter() for meter in KINDS[name]]) / plain[-1])

    title = f"{input_ids.shape[1]:,} tokens, {arguments.dtype}, {device}, {torch.get_num_threads()} threads; "
    table = Table(title=title + f"without meters {statistics.median(plain):.2f} s", box=box.SIMPLE)
    for heading in ("meters", "time / without", "min - max"):
        table.add_column(heading, justify="left" if heading == "meters" else "right")
    for name, ratios in ratios_by_kind.items():
        table.add_row(name, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
