"""Print the response template of a checkpoint, by the code in it: `python print_response_template.py CHECKPOINT`."""

import json
import sys

from transformers import AutoModelForCausalLM
from transformers.cli.serving import utils


model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(utils.get_response_template(None, model)))
