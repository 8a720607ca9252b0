"""A directory carries its code: it loads with trust_remote_code where this package cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.conversion import convert_checkpoint


CODE_FILES = ("configuration_gated_llama.py", "modeling_gated_llama.py")

# argv: the directory to load, where to save the model again, where to write what was computed.
ISOLATED = """
import sys
sys.modules["modeling_gated"] = None  # any import of the package fails
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

source, again, results = sys.argv[1:]
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
assert type(model).__name__ == "GatedLlamaForCausalLM", type(model)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert type(model.config).__module__.startswith("transformers_modules.")
base = AutoModel.from_pretrained(source, trust_remote_code=True)
assert type(base).__name__ == "GatedLlamaModel", type(base)
assert type(AutoModelForCausalLM.from_config(config, trust_remote_code=True)).__name__ == "GatedLlamaForCausalLM"

tokens = torch.arange(40)[None]
with torch.no_grad():
    logits = model(tokens).logits
    assert torch.equal(model.lm_head(base(tokens).last_hidden_state), logits)
generated = model.generate(tokens[:, :8], max_new_tokens=4, do_sample=False, eos_token_id=-1)
torch.save({"logits": logits, "generated": generated}, results)

model.save_pretrained(again)
second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(second(tokens).logits, logits)
assert "modeling_gated" not in {name for name, module in sys.modules.items() if module is not None}
"""


def load_isolated(source: Path, again: Path) -> dict[str, torch.Tensor]:
    """Load, use and save a directory in an interpreter without the package; return what it computed."""
    results = again.with_suffix(".results")
    environment = {
        **os.environ,
        "HF_HOME": str(again.with_suffix(".home")),
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
    }
    finished = subprocess.run(
        [sys.executable, "-c", ISOLATED, source, again, results],
        env=environment,
        cwd=again.parent,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert finished.returncode == 0, finished.stderr
    return torch.load(results)


@pytest.mark.parametrize("writer", ["convert", "save_pretrained"])
def test_three_generations_without_the_package(llama: Path, tmp_path: Path, writer: str) -> None:
    first = tmp_path / "first"
    if writer == "convert":
        convert_checkpoint(llama, first, granularity="elementwise")
        model = AutoModelForCausalLM.from_pretrained(first)
    else:
        torch.manual_seed(0)
        config = GatedLlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            sliding_window=4, use_qk_norm=True,
        )  # fmt: skip
        model = GatedLlamaForCausalLM(config).eval()
        model.save_pretrained(first)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    generated = model.generate(tokens[:, :8], max_new_tokens=4, do_sample=False, eos_token_id=-1)

    for source, again in ((first, tmp_path / "second"), (tmp_path / "second", tmp_path / "third")):
        found = load_isolated(source, again)
        assert torch.equal(found["logits"], expected)
        assert torch.equal(found["generated"], generated)
        for name in CODE_FILES:
            assert (again / name).read_bytes() == (first / name).read_bytes()
        auto_maps = [json.loads((path / "config.json").read_text())["auto_map"] for path in (source, again)]
        assert auto_maps[0] == auto_maps[1]
        assert {reference.split(".")[0] for reference in auto_maps[0].values()} == {"modeling_gated_llama"}


def test_the_carried_code_is_the_package_s_own(tmp_path: Path) -> None:
    """Line for line, but for the one import of the other file; and no package of ours is named."""
    GatedLlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    root = Path(__file__).parents[2]
    for name, original in zip(CODE_FILES, ("configuration", "modeling_gated"), strict=True):
        carried = (tmp_path / name).read_text().splitlines()
        own = (root / original / name).read_text().splitlines()
        changed = [line for line, before in zip(carried, own, strict=True) if line != before]
        assert changed == (
            []
            if original == "configuration"
            else ["from .configuration_gated_llama import GatedLlamaConfig, open_gate"]
        )
        imports = [line for line in carried if line.startswith(("import ", "from "))]
        assert not any("modeling_gated " in line or "modeling_gated." in line for line in imports)


def test_local_code_goes_before_carried_code(llama: Path, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    for trust in (None, False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "gated", trust_remote_code=trust)
        assert type(model) is GatedLlamaForCausalLM


def test_pushing_a_config_uploads_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config and code, and nothing else of ours; the model card is Transformers' doing and left out here."""
    uploaded: list[set[str]] = []

    def upload(self: object, working_dir: str, repo_id: str, files_timestamps: dict, **_: object) -> None:
        assert repo_id == "user/gated"
        uploaded.append(set(os.listdir(working_dir)) - files_timestamps.keys())

    class Repo:
        repo_id = "user/gated"

    class Card:
        def save(self, path: str) -> None:
            pass

    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(GatedLlamaConfig, "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: Repo)
    config = GatedLlamaConfig(num_hidden_layers=1)
    config.push_to_hub("user/gated")
    config.save_pretrained(tmp_path / "gated", push_to_hub=True, repo_id="user/gated")
    assert uploaded == [{"config.json", *CODE_FILES}] * 2
    assert (tmp_path / "gated" / "config.json").is_file()
