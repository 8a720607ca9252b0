"""Reports: their numbers, report.json as its schema has it, the page in a browser, and the command."""

import copy
import dataclasses
import html
import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GPT2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3NextConfig,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.errors import TokenizerError
from modeling_gated.inspection import (
    REPORT_METERS,
    FirstTokenAttention,
    InspectionError,
    Meter,
    ModelReport,
    QuantizationError,
    SummaryRow,
    Tokens,
    inspect_model,
    inspecting,
)
from modeling_gated.inspection.numbers import mean_of
from modeling_gated.inspection.report.page import as_json, as_page, rows_of
from modeling_gated.inspection.report.pictures import PICTURES
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.gated_models import SIZES as GATED_SIZES
from tests.helpers.gated_models import gated_model
from tests.helpers.tiny_configs import tiny_llama


TEXT = "Attention sinks are tokens that get attention for nothing. " * 12
SCHEMA = json.loads(files("modeling_gated.inspection").joinpath("report.schema.json").read_text())
SIZES = {"vocab_size": 258, "max_position_embeddings": 512}


def report_of(model: PreTrainedModel, text: str = TEXT, **options) -> ModelReport:
    defaults = {"name": "tiny", "windows": 3, "window_tokens": 80}
    return inspect_model(model, byte_tokenizer(), text, **defaults | options)


def llama(**options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(tiny_llama(**SIZES | options)).eval()


@pytest.fixture(scope="module")
def gated() -> ModelReport:
    return report_of(gated_model(**SIZES))


@pytest.fixture(scope="module")
def mamba() -> ModelReport:
    """Of a model without attention."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=2)
    return report_of(AutoModelForCausalLM.from_config(config).eval(), name="mamba")


def windows(count: int, length: int) -> list[torch.Tensor]:
    """Spread evenly over the text, each beginning with <s>."""
    ids = list(TEXT.encode())
    letters = byte_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(letters)
    step = len(letters) // count
    return [torch.tensor([[256, *letters[number * step : number * step + length - 1]]]) for number in range(count)]


@pytest.mark.fast
def test_numbers_are_those_of_the_windows(gated: ModelReport) -> None:
    """Loss and meters, in the mean over all windows; the summary is the mean over layers and heads."""
    model, meter = gated_model(**SIZES), FirstTokenAttention()
    with torch.no_grad(), inspecting(model, meter):
        losses = [model(window, labels=window).loss.item() for window in windows(3, 80)]
    assert gated.loss == pytest.approx(sum(losses) / 3, abs=1e-5)
    torch.testing.assert_close(torch.tensor(gated.first_token_attention), meter.result().float())
    assert gated.summary["first_token_attention"] == pytest.approx(meter.result().mean().item())
    assert gated.summary["first_token_attention_maximum"] == pytest.approx(meter.result().mean(1).max().item())
    maxima = [layer["maximum"] for layer in gated.hidden_states["layers"]]
    assert gated.summary["massive_activation"] == pytest.approx(sum(maxima) / 3)
    assert gated.summary["hidden_state_maximum"] == max(maxima)
    assert gated.summary["gate_score"] == pytest.approx(mean_of(gated.gates["G1"]["mean"]))
    assert (gated.windows, gated.window_tokens, gated.beginning) == (3, 80, ["<s>"])
    assert gated.hidden_states["embeddings"]["top"][0]["token"] in (*TEXT, "<s>")


@pytest.mark.fast
def test_interventions_change_the_loss(gated: ModelReport) -> None:
    """Each by as much as its loss differs, closed gates most; those of gates are left out without gates."""
    names = [change.name for change in gated.interventions]
    assert names == ["masked_first_token", "masked_first_token@64", "closed_gates", "open_gates", "shuffled_gates"]
    assert all(abs(change.difference) > 1e-6 for change in gated.interventions)
    assert all(change.loss == pytest.approx(gated.loss + change.difference) for change in gated.interventions)
    plain = report_of(llama(), interventions=["closed_gates"])
    assert plain.interventions == []
    assert plain.notes[0].startswith("the model has no gates")


@pytest.mark.fast(only="gated")
@pytest.mark.parametrize("which", ["gated", "mamba", "both"])
def test_report_json_is_as_its_schema_has_it(which: str, gated: ModelReport, mamba: ModelReport) -> None:
    reports = {"gated": [gated], "mamba": [mamba], "both": [gated, mamba]}[which]
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    content = json.loads(as_json(reports), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    jsonschema.validate(content, SCHEMA)
    assert content["format"] == 1
    spoiled = copy.deepcopy(content)
    spoiled["models"][0]["int8_error"]["more"] = 1
    with pytest.raises(jsonschema.ValidationError, match="'more' was unexpected"):
        jsonschema.validate(spoiled, SCHEMA)
    described = SCHEMA["$defs"]["model"]["properties"]
    for model in content["models"]:
        assert model.keys() == described.keys()
        assert model["summary"].keys() == described["summary"]["properties"].keys()


class TokenCount(Meter):
    """A meter of someone else's: how many tokens each layer was given."""

    report_name = "token_count"
    summary_rows = (SummaryRow("tokens_seen", "tokens seen", "by the last layer", "{:.0f}"),)

    def start(self, layers: int) -> None:
        self._counts = [0] * layers

    def hidden_states(self, layer: int, hidden_states: torch.Tensor, tokens: Tokens) -> None:
        if 0 <= layer < len(self._counts):
            self._counts[layer] += int(tokens.current.sum())

    def report_entry(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return self._counts

    @staticmethod
    def summary(entry: list[int], config: PreTrainedConfig) -> dict[str, float | None]:
        return {"tokens_seen": entry[-1]}


def test_a_meter_brings_its_entry_and_its_row() -> None:
    """One class is enough for report.json, the page and the command's table."""
    model = gated_model(**SIZES)
    report = report_of(model, meters=[*REPORT_METERS, TokenCount], interventions=[])
    assert report.token_count == [240, 240, 240]
    content = json.loads(as_json([report]))
    jsonschema.validate(content, SCHEMA)
    assert content["models"][0]["token_count"] == [240, 240, 240]
    assert content["models"][0]["summary"]["tokens_seen"] == 240
    assert ("tokens seen", ["240"]) in [(row.label, values) for row, values in rows_of([report])]
    assert re.search(r"<td>tokens seen<small>by the last layer</small></td>\n<td>240</td>", as_page([report]))
    # Next to a report without it.
    without = report_of(model, interventions=[])
    assert ("tokens seen", ["240", "-"]) in [(row.label, values) for row, values in rows_of([report, without])]
    with pytest.raises(AttributeError, match="token_count: is no field of the report"):
        _ = without.token_count


@pytest.mark.parametrize("name", ["", "loss", "entries", "as_dict", "int8_error", "two words"])
def test_a_meter_s_name_is_its_own(name: str) -> None:
    class Named(TokenCount):
        report_name = name

    with pytest.raises(ValueError, match=f"Named.report_name={name!r}: must be a name that nothing else"):
        report_of(gated_model(**SIZES), meters=[QuantizationError, Named])


def test_attention_that_cannot_be_seen_is_a_note(mamba: ModelReport) -> None:
    """And all else is measured."""
    assert any("attention was not measured" in note for note in mamba.notes)
    assert any("masked_first_token was left out" in note for note in mamba.notes)
    assert mamba.first_token_attention == []
    assert mamba.summary["first_token_attention"] is None
    assert mamba.summary["massive_activation"] > 0


def test_the_page_has_every_picture_and_number(gated: ModelReport, mamba: ModelReport) -> None:
    page = as_page([gated, mamba])
    for picture in PICTURES:
        assert page.count(f'<h2 id="{picture.name}">') == 1
        assert html.unescape(page).count(f"</strong> {picture.look_for}</p>") == 1
    assert page.count('<img src="data:image/svg+xml;base64,') == len(PICTURES)
    assert f"{gated.loss:.4f}" in page
    assert "attention was not measured" in page
    without = as_page([mamba])
    assert 'id="first_token_attention"' not in without
    assert 'id="hidden_states"' in without
    # Nothing is fetched and nothing is run.
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page


def test_names_and_tokens_are_text_in_the_page(gated: ModelReport) -> None:
    entries = copy.deepcopy(gated.entries)
    entries["hidden_states"]["layers"][0]["top"][0]["token"] = "</code><b onload='x'>\n\"&"
    page = as_page([dataclasses.replace(gated, name="<script>alert(1)</script>", entries=entries)])
    assert "<script" not in page
    assert "<b onload" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page(width: int, gated: ModelReport, mamba: ModelReport, tmp_path: Path) -> None:
    """Every picture has a size, nothing overflows the window, and nothing is written to the console."""
    probe = """<script>addEventListener('load', () => {
      const pictures = [...document.images].map(image => image.naturalWidth);
      const wide = document.documentElement.scrollWidth - innerWidth;
      document.body.innerHTML = `FOUND ${JSON.stringify({pictures, wide})} END`;
    })</script></body>"""
    (tmp_path / "report.html").write_text(as_page([gated, mamba]).replace("</body>", probe), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run(
        ["chromium", *flags, f"file://{tmp_path / 'report.html'}"], capture_output=True, text=True, timeout=120
    )
    content = json.loads(done.stdout.partition("FOUND ")[2].partition(" END")[0])
    assert len(content["pictures"]) == len(PICTURES)
    assert min(content["pictures"]) > 300
    assert content["wide"] <= 0
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "text: must have at least 2 tokens, got 0"),
        ("x", {"text_name": "one.txt"}, "one.txt: must have at least 2 tokens, got 1"),
        (TEXT, {"windows": 0}, "windows must be at least 1, got 0"),
        (TEXT, {"window_tokens": 1}, "window_tokens must be at least 2, got 1"),
        (TEXT, {"interventions": ["closed"]}, "interventions must be among masked_first_token"),
        (TEXT, {"interventions": ["gates=0@3"]}, "tiny: layer must be from 0 to 2, got 3"),
        (TEXT, {"interventions": ["gates=0@1.6"]}, "tiny: head 6: there is no gate of this head at G1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(text: str, options: dict, message: str) -> None:
    with pytest.raises(InspectionError, match=re.escape(message)):
        report_of(gated_model(**SIZES), text, **options)


def test_models_that_do_not_take_the_tokens_are_refused() -> None:
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    with pytest.raises(
        InspectionError,
        match="tiny: does not take windows of 80 tokens, max_position_embeddings=64",
    ):
        report_of(AutoModelForCausalLM.from_config(config))
    with pytest.raises(TokenizerError, match="token ids must be below 96, the number of the model's embeddings, got "):
        report_of(llama(vocab_size=96))
    report = report_of(llama(max_position_embeddings=64))  # RoPE goes on
    assert "windows of 80 tokens are longer than max_position_embeddings=64" in report.notes


def test_a_short_text_gives_what_it_can() -> None:
    report = report_of(gated_model(**SIZES), "abcdefghij", windows=4, window_tokens=80)
    assert (report.windows, report.window_tokens) == (1, 11)
    assert report.notes == ["text has 10 tokens, so that 1 of 4 windows were taken, of 11 of 80 tokens"]
    jsonschema.validate(json.loads(as_json([report])), SCHEMA)
    shortest = report_of(gated_model(**SIZES), "ab")
    assert shortest.window_tokens == 3


def test_windows_too_short_for_other_sinks_are_drawn(tmp_path: Path) -> None:
    report = report_of(gated_model(**SIZES), window_tokens=40)
    assert report.sink_rate["other"] == [[], [], []] or report.summary["sink_rate_other"] is None
    page = as_page([report])
    assert 'id="sink_rate_other"' not in page
    assert 'id="first_token_attention"' in page


def test_a_gated_llama_without_gates_has_none() -> None:
    report = report_of(GatedLlamaForCausalLM(GatedLlamaConfig(**GATED_SIZES | SIZES, gate_position=[])))
    assert report.gates == {}
    assert [change.name for change in report.interventions] == ["masked_first_token", "masked_first_token@64"]


def test_gates_that_are_no_sigmoids_are_not_called_open_or_closed() -> None:
    fields = {"gate_form": "additive", "gate_activation": "silu", "gate_granularity": "elementwise"}
    report = report_of(gated_model(**SIZES, **fields))
    assert report.summary["gate_score"] is not None
    assert report.summary["gate_below"] is None
    assert "open_gates" not in [change.name for change in report.interventions]
    assert any(note.startswith("open_gates was left out") for note in report.notes)


def test_what_takes_no_mask_is_a_note() -> None:
    """And the rest of the report is there."""
    model = gated_model(**SIZES)
    AttentionInterface.register("my_flash", ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register("my_flash", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "my_flash"
    report = report_of(model, interventions=["masked_first_token", "closed_gates"])
    assert [change.name for change in report.interventions] == ["closed_gates"]
    assert any("masked_first_token was left out: attn_implementation='my_flash'" in note for note in report.notes)


def test_layers_without_attention_are_a_note() -> None:
    config = Qwen3NextConfig(
        vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, linear_num_value_heads=2, linear_num_key_heads=1, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    report = report_of(AutoModelForCausalLM.from_config(config).eval(), interventions=[])
    assert any(note.startswith("3 layers have no attention") for note in report.notes)
    assert [len([head for head in layer if head is not None]) for layer in report.first_token_attention] == [0, 0, 0, 2]
    jsonschema.validate(json.loads(as_json([report])), SCHEMA)
    as_page([report])


def test_a_model_in_training_mode_is_measured_without_dropout(gated: ModelReport) -> None:
    model = gated_model(**SIZES, attention_dropout=0.5).train()
    assert report_of(model, interventions=[]).loss == pytest.approx(gated.loss, abs=1e-6)
    assert model.training


def test_activations_that_are_not_finite_are_an_error() -> None:
    model = gated_model(**SIZES)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(InspectionError, match="tiny: layer 1's output: must be finite"):
        report_of(model)
