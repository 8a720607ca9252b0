"""Print the kilobytes that a conversion adds to the peak of memory: `python memory_of_conversion.py SOURCE OUTPUT`."""

import resource
import sys

from modeling_gated.conversion import convert_checkpoint


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


before = peak()
convert_checkpoint(*sys.argv[1:], place="link", granularity="elementwise")
print(peak() - before)
