"""
Load a checkpoint by the code in it, in an untested Transformers: `python load_untested.py CHECKPOINT STATE`.

STATE is "right", or "broken" for a KV cache that keeps nothing. Print "loaded" or the error.
"""

import sys

import transformers


_, checkpoint, state = sys.argv
transformers.__version__ = "5.99.0"
if state == "broken":
    transformers.DynamicCache.update = lambda self, keys, values, *_, **__: (keys, values)  # type: ignore[method-assign]
try:
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
except RuntimeError as error:
    print(error)
else:
    print("loaded")
