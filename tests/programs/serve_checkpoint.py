"""
Load a gated checkpoint as `transformers serve` does: `python serve_checkpoint.py CHECKPOINT CODE`.

CODE is "package" or "carried". Print the model's class and the number of a layer's gates.
"""

import importlib
import sys

from transformers.cli.serving.model_manager import ModelManager


checkpoint, code = sys.argv[1:]
if code == "package":
    importlib.import_module("modeling_gated")
manager = ModelManager(trust_remote_code=code != "package", device="cpu")
model, _ = manager.load_model_and_processor(f"{checkpoint}@main")
print(type(model).__name__, model.model.layers[0].self_attn.g_proj.weight.shape[0])
manager.shutdown()  # its timer would keep the process for five minutes
