"""
Print the token ids of texts, without and with `trust_remote_code`: `python tokenize_texts.py CHECKPOINT TEXTS`.

TEXTS is a list in JSON.
"""

import json
import sys

from transformers import AutoTokenizer


_, checkpoint, texts = sys.argv
for trust in (None, True):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust)
    print(json.dumps([tokenizer(text).input_ids for text in json.loads(texts)]))
