"""What the benchmark compares is what it says: formulations of one function, and the least that gates cost."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PreTrainedModel

from examples.benchmarks import gates as benchmark
from examples.benchmarks import workloads as benchmark_workloads
from examples.benchmarks.gate_formulations import PEERS, FusedGateAttention
from examples.benchmarks.workloads import OURS, WORKLOADS, Training, gated_model, limit, ungated_model


TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def ungated() -> PreTrainedModel:
    torch.manual_seed(0)
    model = ungated_model(LlamaConfig(**TINY), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)  # so that attention is not the mean
    return model


def with_gates_of(model: PreTrainedModel, ours: PreTrainedModel) -> None:
    """Give a peer's model our gates, without bias and scale."""
    for layer, our_layer in zip(model.model.layers, ours.model.layers, strict=True):
        attention, weight = layer.self_attn, our_layer.self_attn.g_proj.weight
        if isinstance(attention, FusedGateAttention):
            parts = [one.chunk(attention.groups) for one in (our_layer.self_attn.q_proj.weight, weight)]
            rows = [part for pair in zip(*parts, strict=True) for part in pair]
            attention.q_proj.weight.copy_(torch.cat(rows))
        else:
            attention.g_proj.weight.copy_(weight)


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_peers_compute_the_same_function(name: str, ungated: PreTrainedModel) -> None:
    ours = gated_model("headwise" if name.endswith("headwise") else "elementwise", ungated)
    for layer in ours.model.layers:
        layer.self_attn.g_proj.bias.zero_()
        layer.self_attn.gate_scale = 1.0
        layer.self_attn.g_proj.weight.mul_(50)
    peer = gated_model(name, ungated)
    with_gates_of(peer, ours)
    expected = ours(TOKENS).logits
    assert (expected - ungated(TOKENS).logits).abs().max() > 0.1
    torch.testing.assert_close(peer(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*OURS, *PEERS])
def test_models_share_the_ungated_weights(name: str, ungated: PreTrainedModel) -> None:
    of_ungated = dict(ungated.named_parameters())
    actual = dict(gated_model(name, ungated).named_parameters())
    shared = {path for path, parameter in actual.items() if parameter is of_ungated.get(path)}
    fused = (
        {path for path in of_ungated if path.endswith("q_proj.weight")}
        if "authors" in name or "qwen" in name
        else set()
    )
    assert shared == set(of_ungated) - fused


@pytest.mark.parametrize("name", OURS)
def test_limit_of_prefill_is_that_of_the_products(name: str, ungated: PreTrainedModel) -> None:
    """Up to what is under the causal mask, of which the counted model computes all."""
    model = gated_model(name, ungated)
    counts = []
    for timed in (model, ungated):
        timed.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            timed(TOKENS[:1], logits_to_keep=1)
        counts.append(counter.get_total_flops())
    masked = 2 * 2 * 12 * 12 * 48 * 2 // 2  # two products, 12 queries and keys, 48 channels, 2 layers; half of them
    biases = sum(layer.self_attn.g_proj.bias.numel() for layer in model.model.layers) * 12 * 2
    expected = (counts[0] + biases - masked) / (counts[1] - masked)
    assert limit(model, ungated, "prefill", 1, 12) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["ungated", *OURS, "plain-headwise", "plain-elementwise"])
def test_memory_of_training_is_what_gates_keep(name: str, ungated: PreTrainedModel) -> None:
    """
    In bytes of float32: the gated output; for elementwise gates the logits, for headwise gates activations and gates,
    and for plain gates, which have no scale, the gates.
    """
    of_ungated = Training(ungated, 2, 12, compiled=False).memory()
    model = ungated if name == "ungated" else gated_model(name, ungated)
    of_gates = Training(model, 2, 12, compiled=False).memory() - of_ungated
    kept = {"elementwise": 48, "headwise": 6 + 6, "plain-elementwise": 48, "plain-headwise": 6}.get(name, 0)
    expected = 2 * 2 * 12 * 4 * (kept + 48)  # layers, windows, tokens, bytes
    assert of_gates == (0 if name == "ungated" else expected)


@pytest.mark.parametrize(
    ("mode", "workloads", "formulations"),
    [("eager", list(WORKLOADS), benchmark.FORMULATIONS), ("compiled", list(WORKLOADS), ["headwise"])],
)
def test_a_table_of_every_workload(
    mode: str, workloads: list[str], formulations: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(benchmark_workloads.SHAPES, "SmolLM2-135M", TINY)
    report = tmp_path / "deep" / "report.md"
    benchmark.main(
        shapes="SmolLM2-135M",
        dtypes="float32",
        modes=mode,
        workloads=",".join(workloads),
        formulations=",".join(formulations),
        rounds=6,
        device="cpu",
        output=report,
    )
    text = report.read_text()
    assert text.count(" tokens: ungated ") == len(workloads)
    for name in formulations:
        assert text.count(f"| {name} ") == len(workloads)


def test_what_fails_is_said_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(name: str, ungated: PreTrainedModel) -> PreTrainedModel:
        if name == "headwise":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more.")
        return gated_model(name, ungated)

    monkeypatch.setitem(benchmark_workloads.SHAPES, "SmolLM2-135M", TINY)
    monkeypatch.setattr(benchmark, "gated_model", failing)
    report = tmp_path / "report.md"
    with pytest.raises(SystemExit, match=r"^error: some measurements failed; see .*report\.md$"):
        benchmark.main(
            dtypes="float32",
            workloads="prefill,decode",
            formulations="headwise,elementwise",
            rounds=3,
            device="cpu",
            output=report,
        )
    text = report.read_text()
    assert text.count("headwise: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\n") == 2
    assert len(re.findall(r"\| elementwise +\| +\d\.\d{3} ", text)) == 2
    assert "And more" not in text


def test_what_a_cuda_device_measures_and_how_much_of_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default all eager, before decoding compiled; caches count where models have them."""
    device = torch.device("cuda")
    wanted = list(benchmark.cases(device, ["Llama-3.1-8B"], ["bfloat16"], [], list(WORKLOADS)))
    assert [(case.mode, case.workload, case.batch_size) for case in wanted] == [
        ("eager", "prefill", 1),
        ("eager", "decode", 1),
        ("eager", "decode", 32),
        ("eager", "training", 1),
        ("compiled", "decode", 1),
        ("compiled", "decode", 32),
    ]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 80 * 10**9))
    # 40 GB: all of 16 GB; less of it where either model has a cache of 17 GB; less yet with states of an optimizer.
    assert [benchmark.layers_that_fit(case, device) for case in wanted[:4]] == [32, 32, 25, 8]


def test_unknown_names_are_refused_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^error: --workloads must be among prefill, decode, training, got decoding$"):
        benchmark.chosen("prefill,decoding", list(WORKLOADS), "--workloads")
