"""
Measure start-up time: imports, the command line, and a checkpoint's first token, each in a new process.

    python examples/benchmarks/start.py [--rounds 7] [--source FOLDER] [--gated FOLDER]

Rows that are compared are measured in turns. The import of the package is compared with the import of Transformers'
Llama classes, which the package needs. The gated checkpoint is compared with its source. make demo writes both
checkpoints. The time to the first token starts after the imports.
"""

import argparse
import statistics
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from examples, if run by its path

from examples.shared.processes import run_measured


NOTHING = "pass"
TRANSFORMERS = "from transformers import AutoModelForCausalLM, LlamaForCausalLM"
PACKAGE = "import modeling_gated"
MODEL = "from modeling_gated import GatedLlamaForCausalLM"
FIRST_TOKEN = """
import sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import modeling_gated
from modeling_gated import GatedLlamaForCausalLM

started = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
inputs = tokenizer("The capital of France is", return_tensors="pt")
model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(time.perf_counter() - started)
"""


def process(*arguments: str | Path) -> float:
    """Return the seconds of a whole Python process."""
    return run_measured([sys.executable, *arguments], capture=True)[0]


def first_token(checkpoint: Path) -> float:
    """Return the seconds from `from_pretrained` to the first token, measured in the process itself."""
    return float(run_measured([sys.executable, "-c", FIRST_TOKEN, checkpoint], capture=True)[2].split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measurements per row (default: %(default)s)")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path("build/demo/SmolLM2-135M-Instruct"),
        help="folder of the source checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--gated",
        type=Path,
        default=Path("build/demo/SmolLM2-135M-Instruct-gated"),
        help="folder of the gated checkpoint (default: %(default)s)",
    )
    arguments = parser.parse_args()
    for folder in (arguments.source, arguments.gated):
        if not (folder / "config.json").is_file():
            sys.exit(f"error: {folder} must be a checkpoint, got no config.json; run make demo")
    command = Path(sys.executable).parent / "gated-llama"
    measures = {
        "python -c pass": lambda: process("-c", NOTHING),
        "import modeling_gated": lambda: process("-c", PACKAGE),
        "importing Transformers' Llama": lambda: process("-c", TRANSFORMERS),
        "importing GatedLlamaForCausalLM": lambda: process("-c", MODEL),
        "gated-llama --help": lambda: process(command, "--help"),
        "gated-llama convert --help": lambda: process(command, "convert", "--help"),
        "first token of the source": lambda: first_token(arguments.source),
        "first token of the gated": lambda: first_token(arguments.gated),
    }
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for name in tqdm([*measures] * arguments.rounds, desc="processes"):
        seconds[name].append(measures[name]())
    compared = {
        "importing GatedLlamaForCausalLM": "importing Transformers' Llama",
        "first token of the gated": "first token of the source",
    }
    table = Table(box=box.MARKDOWN)
    table.add_column("", no_wrap=True)
    for heading in ("seconds", "min - max", "ratio", "to"):
        table.add_column(heading, justify="left" if heading == "to" else "right", no_wrap=True)
    for name, measured in seconds.items():
        other = compared.get(name)
        ratios = [measurement / its for measurement, its in zip(measured, seconds[other], strict=True)] if other else []
        ratio = f"{statistics.median(ratios):.3f}" if ratios else ""
        table.add_row(
            name, f"{statistics.median(measured):.2f}", f"{min(measured):.2f} - {max(measured):.2f}", ratio, other or ""
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
