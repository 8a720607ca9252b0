"""On a Transformers newer than those tested, the first model of a process tests cached generation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM, kv_cache, modeling_gated_llama
from tests.helpers.cache_by_version import NAME
from tests.helpers.gated_models import SIZES, gated_model
from tests.helpers.processes import run_isolated


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that nobody has tested, in a process that has built no model yet."""
    monkeypatch.setattr(modeling_gated_llama, "IS_TESTED_VERSION", False)
    monkeypatch.setattr(kv_cache, "_is_self_tested", False)
    monkeypatch.delenv("GATED_LLAMA_SKIP_SELF_TEST", raising=False)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that keeps nothing, and says nothing of it."""
    monkeypatch.setattr(DynamicCache, "update", lambda self, keys, values, *_, **__: (keys, values))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The differences that each run of the self-test finds."""
    seen: list[float | None] = []
    largest_difference = kv_cache._largest_difference

    def recorded(*arguments: Any) -> float | None:
        seen.append(largest_difference(*arguments))
        return seen[-1]

    monkeypatch.setattr(kv_cache, "_largest_difference", recorded)
    return seen


def build() -> GatedLlamaForCausalLM:
    return GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES))


@pytest.mark.fast
def test_it_runs_once_and_passes(untested: None, runs: list[float | None]) -> None:
    build(), build()
    (difference,) = runs
    assert difference is not None and difference < 1e-4


def test_it_does_not_run_on_a_tested_version(runs: list[float | None]) -> None:
    build()
    assert runs == []


@pytest.mark.fast
@pytest.mark.parametrize("way", ["constructor", "from_pretrained", "from_config"])
def test_a_cache_that_is_not_used_is_one_clear_error(
    way: str, untested: None, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    build().save_pretrained(tmp_path)
    monkeypatch.setattr(kv_cache, "_is_self_tested", False)
    request.getfixturevalue("broken")
    make: dict[str, Callable[[], Any]] = {
        "constructor": build,
        "from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        "from_config": lambda: AutoModelForCausalLM.from_config(GatedLlamaConfig(**SIZES)),
    }
    for _ in range(2):  # not only the first model
        with pytest.raises(RuntimeError) as caught:
            make[way]()
        message = str(caught.value)
        assert message.startswith("cached generation is wrong with transformers 5.")
        for action in ("Install transformers 5.16.1 to 5.24", "newer modeling-gated", "refresh-code CHECKPOINT"):
            assert action in message
        assert "\n" not in message


def test_what_the_test_model_raises_is_named(untested: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("update() got an unexpected argument")

    monkeypatch.setattr(DynamicCache, "update", refuse)
    with pytest.raises(RuntimeError, match=r"a test model raised TypeError: update\(\) got") as caught:
        build()
    assert isinstance(caught.value.__cause__, TypeError)


def test_wrong_only_with_padding_is_seen(untested: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is forgotten: a prompt on its own is right."""
    forward = modeling_gated_llama.GatedLlamaAttention.forward

    def without_mask(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(NAME) is not None and hidden_states.shape[1] == 1:
            kwargs["attention_mask"] = None
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_gated_llama.GatedLlamaAttention, "forward", without_mask)
    with pytest.raises(RuntimeError, match="the last logits of a test model are off by"):
        build()


def test_nan_in_one_row_is_seen(untested: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that hides every key from a query gives NaN in its row; the row before it is right."""
    forward = modeling_gated_llama.GatedLlamaAttention.forward

    def spoiled(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = forward(self, hidden_states, *args, **kwargs)
        if kwargs.get(NAME) is not None and hidden_states.shape[:2] == (2, 1):
            output[1] = torch.nan
        return output, weights

    monkeypatch.setattr(modeling_gated_llama.GatedLlamaAttention, "forward", spoiled)
    with pytest.raises(RuntimeError, match="are off by nan"):
        build()


def test_it_does_not_wait_for_other_processes(
    untested: None, runs: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 `generate` would: one process alone may build a model."""
    monkeypatch.setattr("transformers.generation.utils.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr("transformers.generation.utils.dist.get_world_size", lambda *_: 2)
    monkeypatch.setattr("transformers.generation.utils.dist.is_initialized", lambda *_: True)
    monkeypatch.setattr("transformers.generation.utils.dist.all_reduce", pytest.fail)
    build()
    assert len(runs) == 1


def test_an_interrupted_test_is_run_again(untested: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DynamicCache, "update", interrupt)
        build()
    assert not kv_cache._is_self_tested


def test_a_variable_skips_it(untested: None, broken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATED_LLAMA_SKIP_SELF_TEST", "1")
    build()
    monkeypatch.setenv("GATED_LLAMA_SKIP_SELF_TEST", "0")
    with pytest.raises(RuntimeError, match="GATED_LLAMA_SKIP_SELF_TEST=1 skips this test"):
        build()


@pytest.mark.parametrize("context", ["meta", "empty weights", "fake tensors", "compile"])
def test_it_waits_where_parameters_are_not_real(context: str, untested: None, runs: list[float | None]) -> None:
    if context == "meta":
        with torch.device("meta"):
            build()
    elif context == "empty weights":
        with init_empty_weights():
            build()
    elif context == "fake tensors":
        with FakeTensorMode():
            build()
    else:

        @torch.compile(backend="eager")
        def traced(x: torch.Tensor) -> torch.Tensor:
            kv_cache.check_cached_generation(GatedLlamaForCausalLM, GatedLlamaConfig, "", "")
            return x + 1

        traced(torch.ones(1))
    assert [run for run in runs if run is not None] == []
    build()
    assert [run is not None for run in runs][-1:] == [True]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_partitioned_and_meta_parameters_are_not_real(device: str) -> None:
    """ZeRO-3 leaves parameters of no numbers."""
    sizes = [(0,), (3,)]
    actual = [kv_cache._is_real(torch.nn.Parameter(torch.empty(size, device=device))) for size in sizes]
    assert actual == [False, device == "cpu"]


def test_it_leaves_random_state_and_dtype_alone(untested: None, runs: list[float | None]) -> None:
    """A model is built with the same weights as where no test runs."""
    torch.manual_seed(7)
    with_test = build()
    state = torch.get_rng_state()
    torch.manual_seed(7)
    without_test = build()
    assert torch.equal(torch.get_rng_state(), state) and len(runs) == 1
    for one, other in zip(with_test.parameters(), without_test.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_passes_whatever_the_dtype(dtype: torch.dtype, untested: None, runs: list[float | None]) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            build()
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(before)
    assert len(runs) == 1 and runs[0] < 1e-4  # type: ignore[operator]


@pytest.mark.parametrize("state", ["right", "broken"])
def test_carried_code_tests_itself(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATED_LLAMA_SKIP_SELF_TEST", raising=False)
    gated_model().save_pretrained(tmp_path / "model")
    finished = run_isolated("load_untested.py", tmp_path / "model", state)
    assert finished.returncode == 0, finished.stderr
    if state == "right":
        assert finished.stdout.strip() == "loaded"
    else:
        assert finished.stdout.startswith("cached generation is wrong with transformers 5.99.0: ")
        assert "the last logits of a test model are off by" in finished.stdout
        assert "gated-llama refresh-code CHECKPOINT" in finished.stdout
