"""
Conversion against `cp -r` of the same checkpoint: time and peak memory.

    python examples/benchmark_conversion.py [--directory build/benchmark] [--layers 16] [--rounds 5]

The checkpoint has the shapes of Llama-3.2-1B (2.5 GB, bfloat16, random, sharded). Rounds are interleaved and the
medians compared. A conversion is timed in a fresh process, after Transformers is imported; its memory is the
process's peak, imports included.
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

from processes import run_measured
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from tqdm import tqdm


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
    """A random checkpoint of Llama-3.2-1B's shapes, two layers to a shard."""
    import torch
    from transformers import LlamaConfig

    from modeling_gated import GatedLlamaConfig
    from modeling_gated.conversion.tensors import base_tensor_shapes
    from modeling_gated.conversion.writer import write_safetensors

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
        part = int(name.split(".")[2]) // 2 + 1 if ".layers." in name else 0
        shards.setdefault(f"model-part{part:03}.safetensors", {})[name] = shape
    directory.mkdir(parents=True)
    for file, shapes in tqdm(shards.items(), desc="Writing the checkpoint"):
        path = directory / file
        write_safetensors(
            path, shapes, torch.bfloat16, lambda name, shapes=shapes: torch.randn(shapes[name], dtype=torch.bfloat16)
        )
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(directory)  # last: it says that the checkpoint is complete


def measure(source: Path, target: Path, rounds: int) -> Iterator[tuple[str, float, int]]:
    """Name, seconds and peak memory of each run."""
    for _ in tqdm(range(rounds), desc="Rounds"):
        for name in ("cp -r", "import", "convert --place copy", "convert --place link", "elementwise, --place link"):
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            if name == "cp -r":
                seconds, memory, _ = run_measured(["cp", "-r", source, target])
            elif name == "import":
                seconds, memory, _ = run_measured([sys.executable, "-c", IMPORT])
            else:
                granularity = "elementwise" if "elementwise" in name else "headwise"
                command = [sys.executable, "-c", CONVERT, source, target, name.split()[-1], granularity]
                _, memory, output = run_measured(command, capture=True)
                seconds = json.loads(output)
            yield name, seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/benchmark"), help="where the checkpoint goes")
    parser.add_argument("--layers", type=int, default=16, help="16 layers are 2.5 GB, 32 are 4.4 GB")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    source = arguments.directory.resolve() / f"llama-{arguments.layers}-layers"
    if not (source / "config.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        # In a process of its own, since each run counts this one's memory at its start.
        write = f"from benchmark_conversion import *; write_checkpoint(Path({str(source)!r}), {arguments.layers})"
        subprocess.run([sys.executable, "-c", write], check=True, cwd=Path(__file__).parent)

    runs: dict[str, list[tuple[float, int]]] = {}
    for name, seconds, memory in measure(source, arguments.directory / "result", arguments.rounds):
        runs.setdefault(name, []).append((seconds, memory))
    shutil.rmtree(arguments.directory / "result")

    size = sum(path.stat().st_size for path in source.iterdir())
    table = Table(
        title=f"{decimal(size)}, {len(list(source.glob('*.safetensors')))} shards, medians of {arguments.rounds}",
        box=box.SIMPLE,
    )
    for heading in ("", "seconds", "min - max", "/ cp -r", "memory"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    copying = statistics.median(seconds for seconds, _ in runs["cp -r"])
    for name, results in runs.items():
        times = [seconds for seconds, _ in results]
        median = statistics.median(times)
        memory = statistics.median(memory for _, memory in results)
        ratio = "" if name == "import" else f"{median / copying:.3f}"
        table.add_row(name, f"{median:.3f}", f"{min(times):.3f} - {max(times):.3f}", ratio, decimal(int(memory)))
    Console().print(table)


if __name__ == "__main__":
    main()
