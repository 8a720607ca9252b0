"""Every head computes what Llama's does, and is found where Transformers' own models are found."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from tests.helpers.gated_models import HEADS, SIZES, gated_class, gated_model


# How each head's loss is asked for: names and shapes.
LABELS: dict[str, dict[str, tuple[int, ...]]] = {
    "Model": {},
    "ForCausalLM": {"labels": (2, 33)},
    "ForSequenceClassification": {"labels": (2,)},
    "ForTokenClassification": {"labels": (2, 33)},
    "ForQuestionAnswering": {"start_positions": (2,), "end_positions": (2,)},
}


@pytest.fixture(params=list(HEADS))
def head(request: pytest.FixtureRequest) -> str:
    return request.param


def pair(head: str, config: LlamaConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Llama with this head, and the gated model of the same weights with gates that are the identity."""
    torch.manual_seed(0)
    llama = getattr(transformers, f"Llama{head}")(config).eval()
    gated = gated_class(head)(GatedLlamaConfig.from_source_config(config)).eval()
    # Llama's question answering calls its decoder "transformer".
    weights = {name.replace("transformer.", "model."): tensor for name, tensor in llama.state_dict().items()}
    missing, unexpected = gated.load_state_dict(weights, strict=False)
    assert all(".g_proj." in name for name in missing)
    assert not unexpected
    return llama, gated


def test_auto_classes_know_the_model(head: str) -> None:
    config = AutoConfig.for_model("gated_llama", **SIZES)
    assert type(config) is GatedLlamaConfig
    auto_class = getattr(transformers, HEADS[head])
    assert type(auto_class.from_config(config)) is gated_class(head)


def test_every_head_computes_what_llama_s_does(head: str, tokens: torch.Tensor) -> None:
    """All outputs, tuples too, of padded input, and the loss: bit for bit."""
    llama, gated = pair(head, LlamaConfig(**SIZES, num_labels=3))
    mask = torch.ones_like(tokens)
    mask[1, 20:] = 0
    shapes = LABELS[head]
    labels = {name: torch.arange(torch.Size(shape).numel()).reshape(shape) % 3 for name, shape in shapes.items()}
    for options in ({}, labels, {"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}):
        if "output_attentions" in options:
            llama.set_attn_implementation("eager")
            gated.set_attn_implementation("eager")
        with torch.no_grad():
            expected, actual = (
                model(tokens, attention_mask=mask, use_cache=False, **options) for model in (llama, gated)
            )
        assert type(actual) is type(expected)
        if isinstance(actual, dict):
            assert actual.keys() == expected.keys()
            assert ("loss" in actual) == (bool(options) and options is labels)
            expected, actual = expected.to_tuple(), actual.to_tuple()
        for of_llama, of_gated in zip(expected, actual, strict=True):
            torch.testing.assert_close(of_gated, of_llama, rtol=0, atol=0)


def test_embeddings_in_place_of_tokens(head: str, tokens: torch.Tensor) -> None:
    model = gated_model(model_class=gated_class(head))
    with torch.no_grad():
        expected = model(tokens)[0]
        actual = model(inputs_embeds=model.get_input_embeddings()(tokens))[0]
    assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(tokens, inputs_embeds=model.get_input_embeddings()(tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_embeddings_keeps_what_was_there(tied: bool, tokens: torch.Tensor) -> None:
    model = gated_model(tie_word_embeddings=tied)
    with torch.no_grad():
        expected = model(tokens).logits
        model.resize_token_embeddings(101)
        actual = model(tokens).logits
    assert model.config.vocab_size == 101
    assert actual.shape == (2, 33, 101)
    assert torch.equal(actual[..., :96], expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_logits_to_keep(tokens: torch.Tensor) -> None:
    model = gated_model()
    with torch.no_grad():
        full = model(tokens).logits
        torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, full[:, -3:], rtol=0, atol=1e-6)
        chosen = torch.tensor([0, 7, 20])
        torch.testing.assert_close(model(tokens, logits_to_keep=chosen).logits, full[:, chosen], rtol=0, atol=1e-6)


def test_save_and_load_keep_the_function(head: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = gated_model("elementwise", gated_class(head), num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, HEADS[head]).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-4)


def test_loading_in_another_dtype(head: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Gates are cast like all else, and the dtype asked for is the one that is saved."""
    model = gated_model("elementwise", gated_class(head), num_labels=3)
    model.save_pretrained(tmp_path / "float32")
    auto_class = getattr(transformers, HEADS[head])
    for dtype in (torch.bfloat16, torch.float16):
        loaded = auto_class.from_pretrained(tmp_path / "float32", dtype=dtype)
        expected = copy.deepcopy(model).to(dtype)
        for name, parameter in expected.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name
        loaded.save_pretrained(tmp_path / "half")
        again = auto_class.from_pretrained(tmp_path / "half")
        assert again.dtype == dtype
        with torch.no_grad():
            assert torch.equal(again(tokens)[0], loaded(tokens)[0])
            assert torch.allclose(loaded(tokens)[0].float(), model(tokens)[0], atol=0.1)


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_classification_problems(problem: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Labels have names, are of the problem's type, and survive saving."""
    config = LlamaConfig(**SIZES, id2label={0: "low", 1: "high"}, problem_type=problem)
    labels = torch.tensor([0, 1]) if problem.startswith("single") else torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    llama, gated = pair("ForSequenceClassification", config)
    with torch.no_grad():
        assert torch.equal(gated(tokens, labels=labels).loss, llama(tokens, labels=labels).loss)
    gated.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert (saved.id2label, saved.num_labels, saved.problem_type) == ({0: "low", 1: "high"}, 2, problem)


def test_copies_and_pickles_are_the_model(head: str, tokens: torch.Tensor) -> None:
    model = gated_model("elementwise", gated_class(head), num_labels=3)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.config.to_dict() == model.config.to_dict()
        with torch.no_grad():
            assert torch.equal(again(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied(tied: bool, tmp_path: Path) -> None:
    gated_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied


def test_heads_start_from_a_causal_language_model(head: str, tmp_path: Path) -> None:
    """The checkpoint's decoder, gates and all; only the new head's parameters are missing from it."""
    model = gated_model()
    model.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, HEADS[head]).from_pretrained(tmp_path, output_loading_info=True)
    new = {"ForSequenceClassification": {"score.weight"}, "ForTokenClassification": {"score.weight", "score.bias"}}
    new["ForQuestionAnswering"] = {"qa_outputs.weight", "qa_outputs.bias"}
    assert set(info["missing_keys"]) == new.get(head, set())
    for name, expected in model.model.state_dict().items():
        assert torch.equal(loaded.base_model.get_parameter(name), expected), name


def test_every_linear_layer_has_its_place_in_the_tensor_parallel_plan() -> None:
    """A layer that the plan forgets would be whole on every rank, and a gate then of the wrong shape."""
    model = gated_model("QK-norm, tied", model_class=GatedLlamaForCausalLM)
    for name in ("q_proj", "k_proj", "v_proj", "g_proj"):
        assert model.tp_plan[f"model.layers.*.self_attn.{name}"] == "colwise"
    planned = {name.rsplit(".", 1)[-1] for name in model.tp_plan}
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear <= planned
    assert {"q_norm", "k_norm"} <= planned


def test_a_decoder_layer_is_never_split_over_devices() -> None:
    from accelerate import infer_auto_device_map

    model = gated_model(num_hidden_layers=6)
    layer = sum(parameter.numel() * 4 for parameter in model.model.layers[0].parameters())
    assert set(model._no_split_modules) == {"GatedLlamaDecoderLayer"}
    places = infer_auto_device_map(
        model,
        max_memory={0: int(3.5 * layer), 1: int(3.5 * layer), "cpu": 10**9},
        no_split_module_classes=model._no_split_modules,
    )
    layers = {name for name in places if name.startswith("model.layers.")}
    assert layers == {f"model.layers.{i}" for i in range(6)}
    assert len({places[name] for name in layers}) > 1
