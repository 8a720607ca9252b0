"""Choices and defaults that the library and the command line share, in a module that needs no torch."""

from typing import Literal


# How the source's shards get into a result.
Place = Literal["auto", "reflink", "link", "copy"]
PLACE: Place = "auto"

Granularity = Literal["headwise", "elementwise"]
GRANULARITY: Granularity = "headwise"
GATE_INIT = 0.85

# Dtypes of weights, by torch's names.
DtypeName = Literal["bfloat16", "float16", "float32"]
GGUF_DTYPE: DtypeName = "bfloat16"  # of dequantized tensors

VERIFIED_TOKENS = 512

# Absorbing sinks.
DISTILL_TOKENS = 250_000
SAMPLE_TOKENS = 40_000

# Inspecting a model.
INSPECTED_WINDOWS = 8
INSPECTED_WINDOW_TOKENS = 512
INTERVENTIONS = ("masked_first_token", "masked_first_token@64", "closed_gates", "open_gates", "shuffled_gates")

# Evaluating long contexts.
CONTEXT_TASKS = ("loss", "passkey", "multi_key_needle", "variable_tracking")
CONTEXT_WINDOWS = 1
CONTEXT_SAMPLES = 10
CHUNK_SIZE = 512

SEED = 0
