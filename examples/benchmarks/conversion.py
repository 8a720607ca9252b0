"""
Compare conversion with `cp -r` of the same checkpoint and with mergekit's passthrough merge: time and peak memory.

    python examples/benchmarks/conversion.py [--directory build/benchmark] [--layers 16] [--rounds 5] [--mergekit PATH]

The checkpoint has the shapes of Llama-3.2-1B (2.5 GB, bfloat16, random weights, sharded). Rounds are interleaved, and
the table shows medians. A conversion is timed in a new process after the import of Transformers. Its memory is the peak
of the process, imports included. Rows that begin with a command measure the whole process, imports included.

mergekit needs a separate environment: `pip install torch==2.13.0 transformers==5.23.0 mergekit==0.1.5`. Then add
`--mergekit ENVIRONMENT/bin/mergekit-yaml`. Its flags skip steps that conversion does not have either.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from examples, if run by its path

from examples.shared.processes import run_measured


CONVERT = """
import json, sys, time
from transformers import AutoConfig, LlamaConfig
from modeling_gated.conversion import convert_checkpoint

started = time.perf_counter()
convert_checkpoint(sys.argv[1], sys.argv[2], place=sys.argv[3], granularity=sys.argv[4])
print(json.dumps(time.perf_counter() - started))
"""
IMPORT = "from transformers import AutoConfig, LlamaConfig"


def write_checkpoint(directory: Path, layers: int) -> None:
    """Write a random checkpoint with the shapes of Llama-3.2-1B, two layers per shard."""
    import torch
    from transformers import LlamaConfig

    from modeling_gated import GatedLlamaConfig
    from modeling_gated.checkpoints.safetensors_file import new_tensor, write_safetensors
    from modeling_gated.conversion.tensors import base_tensor_shapes

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in base_tensor_shapes(GatedLlamaConfig.from_source_config(config)):
        number = int(name.split(".")[2]) // 2 + 1 if ".layers." in name else 0
        shards.setdefault(f"model-part{number:03}.safetensors", {})[name] = shape
    directory.mkdir(parents=True)
    for file, shapes in tqdm(shards.items(), desc="Writing the checkpoint"):
        path = directory / file
        tensors = {
            name: new_tensor(shape, torch.bfloat16, lambda shape=shape: torch.randn(shape, dtype=torch.bfloat16))
            for name, shape in shapes.items()
        }
        write_safetensors(path, tensors, {"format": "pt"})
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = ["LlamaForCausalLM"]  # required by mergekit
    config.save_pretrained(directory)  # last, because config.json marks a complete checkpoint


CONVERSIONS = {
    "convert, --place copy": ("copy", "headwise"),
    "convert, --place link": ("link", "headwise"),
    "convert elementwise, --place link": ("link", "elementwise"),
}


def commands(source: Path, target: Path, mergekit: Path | None) -> dict[str, list[str | Path]]:
    """Return the measured command lines by name. sync waits until all data is on disk, as conversion does."""
    gated_llama = Path(sys.executable).with_name("gated-llama")
    command_lines: dict[str, list[str | Path]] = {
        "cp -r": ["cp", "-r", source, target],
        "cp -r; sync": ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', source, target],
        "import": [sys.executable, "-c", IMPORT],
        "gated-llama convert --place copy": [gated_llama, "convert", source, target, "--place", "copy"],
        "gated-llama verify": [gated_llama, "verify", source, target],
    }
    if mergekit is not None:
        merge = target.with_name("passthrough.yaml")
        merge.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": str(source)}]}))
        flags = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--out-shard-size", "300M"]
        command_lines["mergekit-yaml passthrough"] = [mergekit, merge, target, *flags]
    return command_lines


def measure(source: Path, target: Path, rounds: int, mergekit: Path | None) -> Iterator[tuple[str, float, int]]:
    """Yield name, seconds and peak memory in bytes of each run."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    whole = commands(source, target, mergekit)
    for _ in tqdm(range(rounds), desc="Rounds"):
        for name in (*CONVERSIONS, *whole):
            if name != "gated-llama verify":  # verify checks the result of the previous row
                shutil.rmtree(target, ignore_errors=True)
                os.sync()
            if name in whole:
                seconds, memory, _ = run_measured(whole[name], capture=True)
            else:
                _, memory, output = run_measured(
                    [sys.executable, "-c", CONVERT, source, target, *CONVERSIONS[name]], capture=True
                )
                seconds = json.loads(output)
            yield name, seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("build/benchmark"),
        help="folder for the checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--layers", type=int, default=16, help="number of layers: 16 are 2.5 GB, 32 are 4.4 GB (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements per row (default: %(default)s)")
    parser.add_argument(
        "--mergekit", type=Path, help="path of mergekit-yaml in its environment (default: no mergekit row)"
    )
    arguments = parser.parse_args()
    source = arguments.directory.resolve() / f"llama-{arguments.layers}-layers"
    if not (source / "config.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        # In another process: measured memory includes the memory of this process at the start.
        write = (
            f"from examples.benchmarks.conversion import *; write_checkpoint(Path({str(source)!r}), {arguments.layers})"
        )
        subprocess.run([sys.executable, "-c", write], check=True, cwd=Path(__file__).parents[2])

    runs: dict[str, list[tuple[float, int]]] = {}
    for name, seconds, memory in measure(
        source, arguments.directory.resolve() / "result", arguments.rounds, arguments.mergekit
    ):
        runs.setdefault(name, []).append((seconds, memory))
    shutil.rmtree(arguments.directory / "result")

    size = sum(path.stat().st_size for path in source.iterdir())
    table = Table(
        title=f"{decimal(size)}, {len(list(source.glob('*.safetensors')))} shards, medians of {arguments.rounds}",
        box=box.SIMPLE,
    )
    for heading in ("", "seconds", "min - max", "/ cp -r", "/ cp -r; sync", "memory"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    copying, durable = (statistics.median(seconds for seconds, _ in runs[name]) for name in ("cp -r", "cp -r; sync"))
    for name, results in runs.items():
        times = [seconds for seconds, _ in results]
        median = statistics.median(times)
        memory = statistics.median(memory for _, memory in results)
        ratios = ["" if name == "import" else f"{median / other:.3f}" for other in (copying, durable)]
        table.add_row(name, f"{median:.3f}", f"{min(times):.3f} - {max(times):.3f}", *ratios, decimal(int(memory)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
