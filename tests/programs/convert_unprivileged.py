"""Convert a checkpoint without root's rights: `python convert_unprivileged.py SOURCE OUTPUT FIRST_OUTPUT`."""

import os
import sys

from modeling_gated.conversion import ConversionError, convert_checkpoint


source, output, first_output = sys.argv[1:]
convert_checkpoint(source, first_output)  # imports everything: it may lie where only root may read
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    convert_checkpoint(source, output)
except ConversionError as error:
    sys.exit(str(error))
