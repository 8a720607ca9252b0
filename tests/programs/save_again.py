"""
Load, run and save checkpoints by the code in them: `python save_again.py SOURCE OUTPUT`.

SOURCE holds one folder per checkpoint. Its file `how` names the Auto class, and says whether there are weights.
Results are written next to OUTPUT.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers


source, again = map(Path, sys.argv[1:])
tokens = torch.arange(1, 41)[None]
results: dict[str, dict[str, Any]] = {}
for directory in sorted(source.iterdir()):
    class_name, has_weights = (directory / "how").read_text().split()
    auto_class = getattr(transformers, class_name)
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)
    if has_weights == "True":
        model = auto_class.from_pretrained(directory, trust_remote_code=True)
    else:
        model = auto_class.from_config(config, trust_remote_code=True).eval()
    for thing in (config, model, model.config):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    with torch.no_grad():
        results[directory.name] = {"class": type(model).__name__, "output": model(tokens)[0]}
        if hasattr(model, "lm_head"):
            generated = model.generate(tokens[:, :8], max_new_tokens=4, do_sample=False, eos_token_id=None)
            results[directory.name]["generated"] = generated
    model.save_pretrained(again / directory.name)
    (again / directory.name / "how").write_text(f"{class_name} True")
torch.save(results, again.with_suffix(".results"))
assert "modeling_gated" not in {name for name, module in sys.modules.items() if module is not None}
