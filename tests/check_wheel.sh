#!/usr/bin/env bash
# Builds the source distribution, the wheel from it, and runs the wheel in an environment of its own from an empty folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
environment=$root/build/wheel-environment
rm -rf "$root/build/lib" "$root/build/wheel"
(cd "$root" && .venv/bin/python -c "import setuptools.build_meta as s; s.build_sdist('build/wheel')" > "$root/build/sdist.log")
"$root/.venv/bin/pip" wheel -q --no-deps --wheel-dir "$root/build/wheel" "$root"/build/wheel/*.tar.gz
[ -x "$environment/bin/python" ] || "$root/.venv/bin/python" -m venv "$environment"
"$environment/bin/pip" install -q --disable-pip-version-check -c "$root/constraints.txt" "$root"/build/wheel/*.whl
"$environment/bin/pip" install -q --disable-pip-version-check --no-deps --force-reinstall "$root"/build/wheel/*.whl

empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
cd "$empty"
"$environment/bin/gated-llama" --version
"$environment/bin/python" - <<'PYTHON'
import pathlib

import torch
import transformers

import modeling_gated
from modeling_gated.conversion import convert_checkpoint

assert "wheel-environment" in modeling_gated.__file__, modeling_gated.__file__
config = transformers.Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)
source = transformers.AutoModelForCausalLM.from_config(config)
source.save_pretrained("source")
convert_checkpoint("source", "gated")
gated = transformers.AutoModelForCausalLM.from_pretrained("gated")
tokens = torch.arange(64)[None]
assert torch.equal(gated(tokens).logits, source(tokens).logits)
assert pathlib.Path("gated/modeling_gated_llama.py").is_file()
print("the installed wheel converts and loads")
PYTHON
[ -f "$("$environment/bin/python" -c "import modeling_gated as m; print(m.__path__[0])")/py.typed" ]
