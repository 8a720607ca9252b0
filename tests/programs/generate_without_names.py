"""
Print the tokens that a checkpoint generates by the code in it, where Transformers lacks names that its config does not
need: `python generate_without_names.py CHECKPOINT`.
"""

import sys

import torch
import transformers
import transformers.trainer  # imported before the table is deleted: Transformers' own code needs the table
from transformers.distributed import tensor_parallel
from transformers.models.auto import modeling_auto


for module in ("arcee.modeling_arcee", "glm4.modeling_glm4"):
    sys.modules[f"transformers.models.{module}"] = None  # type: ignore[assignment]
del tensor_parallel.ALL_PARALLEL_STYLES, tensor_parallel.TensorParallelLayer
del modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(torch.arange(1, 9)[None], max_new_tokens=4, do_sample=False, eos_token_id=None).tolist())
