"""vLLM's entry point, with a stand-in for vLLM: tests/integration/test_vllm.py has the real one."""

import sys
from importlib.metadata import entry_points
from types import ModuleType

import pytest


class Registry:
    """What is known of vLLM's ModelRegistry."""

    def __init__(self) -> None:
        self.registered: list[tuple[str, str]] = []

    def get_supported_archs(self) -> list[str]:
        return [name for name, _ in self.registered]

    def register_model(self, name: str, model: str) -> None:
        self.registered.append((name, model))


def test_vllm_finds_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the group in which it looks, in a process that may call it twice."""
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = registry = Registry()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    (entry,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "gated_llama")
    for _ in range(2):
        entry.load()()
    assert registry.registered == [
        ("GatedLlamaForCausalLM", "vllm.model_executor.models.transformers:TransformersForCausalLM")
    ]
