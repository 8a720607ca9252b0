"""
Convert and ungate checkpoints: `python convert_absurd.py OUTPUT SOURCE ...`.

Print the number of errors, kilobytes by which the peak of memory rose, and seconds.
"""

import resource
import sys
import time

from modeling_gated.conversion import ConversionError, convert_checkpoint, ungate_checkpoint


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


before, started, errors = peak(), time.monotonic(), 0
_, output, *sources = sys.argv
for number, source in enumerate(sources):
    for name, act in (("convert", convert_checkpoint), ("ungate", ungate_checkpoint)):
        try:
            act(source, f"{output}/{name}-{number}")
        except ConversionError:
            errors += 1
print(errors, peak() - before, time.monotonic() - started)
