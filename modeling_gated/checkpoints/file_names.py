"""Names of the files that this package writes into a checkpoint."""

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from modeling_gated.configuration.configuration_gated_llama import CARRIED_MODULES


CARD_NAME = "README.md"
MANIFEST_NAME = "gated_llama_manifest.json"
# Files that conversion writes itself; the source's of the same name are kept, as text, in the manifest.
OWN_FILES = (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    CARD_NAME,
    MANIFEST_NAME,
    *CARRIED_MODULES,
)
