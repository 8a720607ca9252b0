"""A directory carries its code: it loads with trust_remote_code where this package cannot be imported."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.configuration import open_gate
from modeling_gated.configuration.configuration_gated_llama import CARRIED_MODULES
from modeling_gated.conversion import convert_checkpoint
from tests.helpers.checkpoints import forget_gates
from tests.helpers.fake_hub import Repository, serving
from tests.helpers.gated_models import HEADS, SIZES, gated_class, gated_model
from tests.helpers.paper_variants import CONFIGS, random_model
from tests.helpers.processes import run_isolated


CODE_FILES = tuple(CARRIED_MODULES)
# What carried code may import: packages without which there is no Transformers, and torch.
LIBRARIES = {"huggingface_hub", "numpy", "packaging", "torch", "transformers"}
TOKENS = torch.arange(1, 41)[None]


def save_pretrained(model: PreTrainedModel, path: Path) -> None:
    model.save_pretrained(path)


def save_config(model: PreTrainedModel, path: Path) -> None:
    model.config.save_pretrained(path)


def save_trainer_checkpoint(model: PreTrainedModel, path: Path) -> None:
    labels = {"labels": 1}
    if "QuestionAnswering" in type(model).__name__:
        labels = {"start_positions": 1, "end_positions": 2}
    elif "Sequence" not in type(model).__name__:
        labels = {"labels": [1] * 40}
    arguments = TrainingArguments(path.parent, max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=[{"input_ids": TOKENS[0].tolist(), **labels}] * 8).train()
    (path.parent / "checkpoint-1").rename(path)


def save_merged_adapter(model: PreTrainedModel, path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["g_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.5)
    tuned.merge_and_unload().save_pretrained(path)


def save_with_accelerate(model: PreTrainedModel, path: Path) -> None:
    """Weights alone, and the code by what the README says to do about it."""
    from accelerate import Accelerator

    Accelerator(cpu=True).save_model(model, path)
    model.config.save_pretrained(path)


def save_shards_and_merge(model: PreTrainedModel, path: Path) -> None:
    """As FSDP leaves a sharded state dict, and what the README says to do about it."""
    from accelerate.utils import merge_fsdp_weights
    from torch.distributed import checkpoint

    shards = path.with_name(f"{path.name} shards") / "pytorch_model_fsdp_0"
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=shards, no_dist=True)
    merge_fsdp_weights(shards, path)
    shutil.rmtree(shards.parent)
    model.config.save_pretrained(path)


WRITERS: dict[str, Callable[[PreTrainedModel, Path], None]] = {
    "model.save_pretrained": save_pretrained,
    "config.save_pretrained": save_config,
    "Trainer checkpoint": save_trainer_checkpoint,
    "merged PEFT model": save_merged_adapter,
    "accelerate's save_model": save_with_accelerate,
    "merged shards": save_shards_and_merge,
}
WRITTEN = [(writer, head) for writer in WRITERS for head in HEADS if (writer, head) != ("Trainer checkpoint", "Model")]


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Directories by every writer for every head, then twice loaded and saved again without the package."""
    root = tmp_path_factory.mktemp("generations")
    first = root / "first"
    for writer, head in WRITTEN:
        path = first / f"{writer}, {head}"
        model = gated_model("elementwise", gated_class(head), num_labels=3, use_qk_norm=True)
        WRITERS[writer](model, path)
        (path / "how").write_text(f"{HEADS[head]} {writer != 'config.save_pretrained'}")
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(root / "source")
    convert_checkpoint(root / "source", first / "gated-llama convert, ForCausalLM")
    (first / "gated-llama convert, ForCausalLM" / "how").write_text("AutoModelForCausalLM True")
    for source_path, again in ((first, root / "second"), (root / "second", root / "third")):
        finished = run_isolated("save_again.py", source_path, again)
        assert finished.returncode == 0, finished.stderr
    return [first, root / "second", root / "third"]


@pytest.mark.parametrize(("writer", "head"), [*WRITTEN, ("gated-llama convert", "ForCausalLM")])
def test_every_directory_carries_its_code(writer: str, head: str, generations: list[Path]) -> None:
    """Loaded, saved and loaded again without the package: class, outputs, generated text and files are the same."""
    name = f"{writer}, {head}"
    first, second, third = (generation / name for generation in generations)
    results = [torch.load(generation.with_suffix(".results"))[name] for generation in generations[1:]]
    if writer != "config.save_pretrained":  # without weights every model is another
        model = getattr(transformers, HEADS[head]).from_pretrained(first)
        with torch.no_grad():
            expected = {"class": type(model).__name__, "output": model(TOKENS)[0]}
        results.append(expected)
        if head == "ForCausalLM":
            generated = model.generate(TOKENS[:, :8], max_new_tokens=4, do_sample=False, eos_token_id=None)
            assert torch.equal(results[0]["generated"], generated)
            assert torch.equal(results[1]["generated"], generated)
    for result in results:
        assert result["class"] == f"GatedLlama{head}"
        if writer != "config.save_pretrained":
            assert torch.equal(result["output"], results[-1]["output"])
    for file in CODE_FILES:
        assert (first / file).read_bytes() == (second / file).read_bytes() == (third / file).read_bytes()
    auto_maps = [json.loads((path / "config.json").read_text())["auto_map"] for path in (first, second, third)]
    assert auto_maps[0] == auto_maps[1] == auto_maps[2]
    assert auto_maps[0].keys() == {"AutoConfig", *HEADS.values()}
    assert {reference.split(".")[0] for reference in auto_maps[0].values()} == {"modeling_gated_llama"}


def test_every_variant_loads_without_the_package(tmp_path: Path) -> None:
    """And is saved there as it was loaded. Logits may differ in their last bits: weights lie elsewhere in memory."""
    models = {name: random_model(name) for name in CONFIGS}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "first" / name)
        (tmp_path / "first" / name / "how").write_text("AutoModelForCausalLM True")
    finished = run_isolated("save_again.py", tmp_path / "first", tmp_path / "second")
    assert finished.returncode == 0, finished.stderr
    results = torch.load(tmp_path / "second.results")
    for name, model in models.items():
        with torch.no_grad():
            torch.testing.assert_close(results[name]["output"], model(TOKENS).logits, rtol=1e-4, atol=1e-4)
        weights = [(tmp_path / again / name / "model.safetensors").read_bytes() for again in ("first", "second")]
        assert weights[0] == weights[1], name


def test_an_adapter_finds_its_base_s_code(tmp_path: Path) -> None:
    """It carries none itself: its base model does, and trust_remote_code is passed on to it."""
    peft = pytest.importorskip("peft")
    gated_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(base, config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.py"))
    finished = run_isolated("logits_of_adapter.py", tmp_path / "adapter", tmp_path / "logits")
    assert finished.returncode == 0, finished.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), tuned(TOKENS).logits)


@pytest.mark.fast
def test_the_carried_code_is_the_package_s_own(tmp_path: Path) -> None:
    """Line for line, but for imports of other files; Transformers finds all files, and the package is not imported."""
    GatedLlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    root, changed = Path(__file__).parents[2], []
    for name in CODE_FILES:
        short = name.replace("_gated_llama", "")
        source = next(root / folder / file for folder in ("configuration", "modeling_gated") for file in (name, short)
                      if (root / folder / file).is_file())  # fmt: skip
        lines, carried = source.read_text().splitlines(), (tmp_path / name).read_text().splitlines()
        changed += [new for old, new in zip(lines, carried, strict=True) if new != old]
        assert not re.search(r"^\s*(?:from|import) modeling_gated(?!_llama)", "\n".join(carried), flags=re.MULTILINE)
        assert set(get_imports(tmp_path / name)) <= {*sys.stdlib_module_names, *LIBRARIES}
    assert sorted(changed) == [
        "from .configuration_gated_llama import (  # first: it checks versions",
        "from .gate_functions_gated_llama import GATE_ACTIVATIONS, RecomputedSigmoidGate, with_dtype",
        "from .gate_opening_gated_llama import initial_gate_bias",
        "from .gate_opening_gated_llama import initial_gate_bias, initial_gate_weight",
        "from .kv_cache_gated_llama import "
        "PASSES_KWARGS_TO_CACHE, check_cached_generation, forward_with_cache, take_cache",
        "from .log_sum_exp_gated_llama import attend_with_log_sum_exp, check_backend",
        "from .lookups_gated_llama import register_class_names, register_shared_gate_style",
    ]
    siblings = get_relative_import_files(tmp_path / "modeling_gated_llama.py")
    assert sorted(Path(file).name for file in siblings) == sorted(set(CODE_FILES) - {"modeling_gated_llama.py"})


def test_carried_code_needs_the_package_to_gate_a_source_s_config(tmp_path: Path) -> None:
    """The source families are no part of it."""
    GatedLlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "gated")
    finished = run_isolated("gate_source_config.py", tmp_path / "gated")
    assert finished.returncode == 0, finished.stderr
    expected = GatedLlamaConfig.from_source_config(LlamaConfig()).to_dict()
    assert json.loads(finished.stdout) == json.loads(json.dumps(expected))


def test_carried_code_opens_missing_gates_as_conversion_does(llama: Path, tmp_path: Path) -> None:
    """At an opening whose rounded logit has no scale with which the gate is exactly 1."""
    convert_checkpoint(llama, tmp_path / "gated", gate_init=0.7)
    bias = open_gate(0.7)[0]
    assert bias != torch.tensor(math.log(0.7 / 0.3), dtype=torch.bfloat16).item()
    forget_gates(tmp_path / "gated")
    finished = run_isolated("print_gate_biases.py", tmp_path / "gated")
    assert finished.returncode == 0, finished.stderr
    actual = torch.tensor(json.loads(finished.stdout))
    assert actual.numel() and torch.all(actual == bias)


def test_a_model_on_the_hub_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers downloads each file that another imports."""
    model = gated_model()
    model.save_pretrained(tmp_path / "gated")
    files = {path.name: path.read_bytes() for path in (tmp_path / "gated").iterdir()}
    repository = Repository("user/gated", "0" * 40, files)
    with serving(repository, monkeypatch) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        finished = run_isolated("logits_from_hub.py", "user/gated", tmp_path / "logits", is_online=True)
    assert finished.returncode == 0, finished.stderr
    assert set(CODE_FILES) <= set(repository.downloaded)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), model(TOKENS).logits)


@pytest.mark.parametrize("trust", [None, False, True])
def test_local_code_goes_before_carried_code(trust: bool | None, llama: Path, tmp_path: Path) -> None:
    """And nothing asks: there is nobody to answer, so a question would be an error."""
    convert_checkpoint(llama, tmp_path / "gated")
    assert type(AutoConfig.from_pretrained(tmp_path / "gated", trust_remote_code=trust)) is GatedLlamaConfig
    for head, auto_class in HEADS.items():
        model = getattr(transformers, auto_class).from_pretrained(tmp_path / "gated", trust_remote_code=trust)
        assert type(model) is gated_class(head)


def test_registering_for_an_auto_class_changes_nothing(tmp_path: Path) -> None:
    """Transformers' guide to custom models says to do it, and loading carried code does it; here it is not needed."""
    GatedLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    GatedLlamaConfig.register_for_auto_class()
    model = gated_model()
    model.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "config")
    assert {path.name for path in (tmp_path / "model").glob("*.py")} == set(CODE_FILES)
    saved = [json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("model", "config")]
    assert saved[0] == saved[1]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bytes]]:
    """A hub that takes every commit; the files of each."""
    commits: list[dict[str, bytes]] = []

    class Repo:
        repo_id = "user/gated"

    def create_commit(self: object, repo_id: str, operations: list, **_: object) -> None:
        assert repo_id == Repo.repo_id
        commits.append({})
        for operation in operations:
            with operation.as_file() as file:
                commits[-1][operation.path_in_repo] = file.read()

    class Card:
        def save(self, path: str) -> None:
            pass

    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: Repo)
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", create_commit)
    return commits


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained(push_to_hub=True)"])
@pytest.mark.parametrize("what", ["config", "model"])
def test_pushing_uploads_the_code(what: str, way: str, hub: list[dict[str, bytes]], tmp_path: Path) -> None:
    model = gated_model()
    thing = model.config if what == "config" else model
    if way == "push_to_hub":
        thing.push_to_hub("user/gated")
    else:
        thing.save_pretrained(tmp_path / "gated", push_to_hub=True, repo_id="user/gated")
    weights = {"model.safetensors", "generation_config.json"} if what == "model" else set()
    (commit,) = hub
    assert commit.keys() == {"config.json", *CODE_FILES, *weights}
    model.config.save_pretrained(tmp_path / "expected")
    for name in CODE_FILES:
        assert commit[name] == (tmp_path / "expected" / name).read_bytes()
    assert "auto_map" in json.loads(commit["config.json"])
