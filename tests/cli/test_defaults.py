"""A command does by default what the library's function does by default."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter, signature
from typing import Any

import pytest

from modeling_gated import GatedLlamaConfig, cli, conversion, defaults
from modeling_gated.absorption import AbsorptionSettings, absorb_checkpoint
from modeling_gated.cli import checkpoints
from modeling_gated.evaluation import TASKS, evaluate_context
from modeling_gated.inspection import inspect_model


def library_defaults(*functions: Callable[..., Any]) -> dict[str, Any]:
    parameters = [parameter for function in functions for parameter in signature(function).parameters.values()]
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not Parameter.empty}


@pytest.mark.parametrize(
    ("command", "functions", "names"),
    [
        (checkpoints.convert, [conversion.convert_checkpoint], {}),
        (checkpoints.verify, [conversion.verify_checkpoint], {}),
        (checkpoints.extend, [conversion.extend_checkpoint], {}),
        (checkpoints.ungate, [conversion.ungate_checkpoint], {}),
        (checkpoints.repair_tokenizer, [conversion.repair_tokenizer], {}),
        (cli.absorb, [absorb_checkpoint, AbsorptionSettings], {}),
        (cli.inspect, [inspect_model], {"length": "window_tokens"}),
        (cli.evaluate_context, [evaluate_context], {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_commands_have_the_defaults_of_the_library(
    command: Callable[..., Any], functions: list[Callable[..., Any]], names: dict[str, str]
) -> None:
    expected, compared = library_defaults(*functions), 0
    for option, default in library_defaults(command).items():
        name = names.get(option, option)
        if name in expected:
            compared += 1
            value = expected[name]
            if isinstance(value, tuple) and default is None:  # nothing given
                value = value or None
            assert default == (",".join(value) if isinstance(value, tuple) else value), option
    assert compared


def test_choices_are_those_of_config_and_tasks() -> None:
    config = GatedLlamaConfig()
    assert (config.gate_granularity, config.gate_init) == (defaults.GRANULARITY, defaults.GATE_INIT)
    granularity = next(field for field in fields(GatedLlamaConfig) if field.name == "gate_granularity")
    assert granularity.type == defaults.Granularity
    assert ("loss", *TASKS) == defaults.CONTEXT_TASKS


def test_defaults_need_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['gated-llama']; import modeling_gated.defaults, modeling_gated.errors; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
