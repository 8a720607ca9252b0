"""What a gated model learns from a teacher, in numbers and in memory."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.training import Distillation, share_frozen_parameters, sum_over_chunks, ungated
from tests.helpers.close_tensors import assert_close
from tests.helpers.gated_models import SIZES, gated_model
from tests.helpers.largest_tensor import Largest
from tests.helpers.source_models import randomize


def source(**options: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"pad_token_id": None} | options))
    randomize(model)
    return model.eval()


def converted(teacher: PreTrainedModel, **options: Any) -> GatedLlamaForCausalLM:
    """The gated model of a source, its gates at their start; it has copies of the weights."""
    student = GatedLlamaForCausalLM(GatedLlamaConfig.from_source_config(teacher.config, **options))
    student.load_state_dict(copy.deepcopy(teacher.state_dict()), strict=False)
    return student.eval()


def train_gates_alone(student: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("g_proj" in name)
    return student


def moved(student: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "g_proj" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return student


def storages(*models: nn.Module) -> dict[int, int]:
    """Addresses and sizes of the memory that parameters and buffers lie in."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def masks() -> dict[str, torch.Tensor | None]:
    right, left = torch.ones(2, 33, dtype=torch.long), torch.ones(2, 33, dtype=torch.long)
    right[0, 20:] = 0
    left[1, :9] = 0
    return {"no padding": None, "padding right": right, "padding left": left}


def reference(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and KL loss in the models' own dtype, all tokens' logits at once."""
    results = []
    for model in (student, teacher):
        outputs: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.o_proj.register_forward_hook(lambda _, __, output, to=outputs: to.append(output))
            for layer in model.model.layers
        ]
        logits = model(input_ids=tokens, attention_mask=mask).logits
        for hook in hooks:
            hook.remove()
        results.append((outputs, logits))
    weights = torch.ones(tokens.shape) if mask is None else mask
    weights = weights.to(student.dtype)
    ratios = []
    for actual, expected in zip(results[0][0], results[1][0], strict=True):
        expected = expected.detach()
        squared = ((actual - expected) ** 2).sum(-1), (expected**2).sum(-1)
        ratios.append((squared[0] * weights).sum() / (squared[1] * weights).sum())
    logits, expected_logits = results[0][1], results[1][1].detach()
    probabilities = expected_logits.softmax(-1)
    divergences = (probabilities * (probabilities.log() - logits.softmax(-1).log())).sum(-1)
    return sum(ratios) / len(ratios), (divergences * weights).sum() / weights.sum()


@pytest.mark.fast
@pytest.mark.parametrize("mask", list(masks()))
def test_a_converted_model_has_nothing_to_learn(mask: str, tokens: torch.Tensor) -> None:
    teacher = source()
    for options in ({}, {"teacher": teacher}):
        output = Distillation(converted(teacher), **options)(tokens, masks()[mask])
        for value in (output.loss, output.attention_loss, output.kl_loss):
            assert value.shape == ()
            assert value.dtype == torch.float32
            assert abs(value.item()) < 1e-6


@pytest.mark.fast
@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0)])
def test_losses_are_what_the_formulas_say(weights: tuple[float, float], mask: str, tokens: torch.Tensor) -> None:
    teacher = source()
    student = moved(converted(teacher))
    attention_mask = masks()[mask]
    distillation = Distillation(student, teacher, attention_weight=weights[0], kl_weight=weights[1], chunk_size=10)
    losses = distillation(tokens, attention_mask)
    with torch.no_grad():
        doubles = [copy.deepcopy(model).double() for model in (student, teacher)]
        attention, kl = (float(value) for value in reference(*doubles, tokens, attention_mask))
    assert attention > 0.01
    assert kl > 1e-5
    np.testing.assert_allclose(losses.attention_loss.item(), attention, rtol=1e-4)
    np.testing.assert_allclose(losses.kl_loss.item(), kl, rtol=2e-3)
    np.testing.assert_allclose(losses.loss.item(), weights[0] * attention + weights[1] * kl, rtol=1e-3)


def test_what_has_no_weight_is_not_computed(tokens: torch.Tensor) -> None:
    teacher = source()
    student = moved(converted(teacher))
    both = Distillation(student, teacher)(tokens)
    attention = Distillation(student, teacher, kl_weight=0)(tokens)
    assert attention.kl_loss is None
    assert_close(attention.loss, both.attention_loss)
    hooks: list[int] = []
    student.model.norm.register_forward_hook(
        lambda *_: hooks.append(len(student.model.layers[0].self_attn._forward_hooks))
    )
    kl = Distillation(student, teacher, attention_weight=0)(tokens)
    assert kl.attention_loss is None
    assert_close(kl.loss, both.kl_loss)
    assert hooks == [0]
    student.lm_head.register_forward_hook(lambda *_: hooks.append(-1))
    Distillation(student, teacher, kl_weight=0)(tokens)
    assert hooks == [0, 1]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("mask", ["no padding", "padding left"])
def test_gradients_are_those_of_all_tokens_at_once(
    mask: str, chunk_size: int, checkpointed: bool, tokens: torch.Tensor
) -> None:
    teacher = source().double()
    student = moved(converted(teacher).double())
    attention, kl = reference(student, teacher, tokens, masks()[mask])
    (0.5 * attention + 2 * kl).backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    if checkpointed:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    distillation = Distillation(student, teacher, attention_weight=0.5, kl_weight=2.0, chunk_size=chunk_size).train()
    output = distillation(tokens, masks()[mask])
    assert output.loss.dtype == torch.float64
    torch.testing.assert_close(output.kl_loss, kl, rtol=1e-9, atol=1e-12)
    output.loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-10)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_sum_over_chunks_is_the_sum(tokens: torch.Tensor) -> None:
    rows = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(20, 1, dtype=torch.float64)
    for chunk_size in (1, 6, 20, 50):
        sizes: list[int] = []

        def summed(chunk: torch.Tensor, factor: torch.Tensor, to: list[int] = sizes) -> torch.Tensor:
            to.append(len(chunk))
            return (chunk.sin() * factor).sum()

        total = sum_over_chunks(summed, rows, factors, chunk_size=chunk_size)
        torch.testing.assert_close(total, (rows.sin() * factors).sum())
        assert max(sizes) == min(chunk_size, 20)
        (gradient,) = torch.autograd.grad(total, rows)
        torch.testing.assert_close(gradient, rows.cos() * factors)


def test_nothing_that_a_chunk_makes_is_kept_but_of_the_last() -> None:
    rows, factors = torch.randn(20, 3, requires_grad=True), torch.randn(3, 1000)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = sum_over_chunks(lambda chunk: (chunk @ factors).exp().sum(), rows, chunk_size=5)
    assert max(kept) == 5 * 1000
    assert kept.count(5 * 1000) == 1
    (gradient,) = torch.autograd.grad(total, rows)
    assert_close(gradient, (rows @ factors).exp() @ factors.T)


@pytest.mark.parametrize("head_trained", [False, True])
def test_no_more_logits_than_those_of_a_chunk(head_trained: bool) -> None:
    """Neither in the forward nor in the backward pass; the head's own gradient is of 48 tokens' size."""
    teacher = source(vocab_size=1000)
    student = train_gates_alone(moved(converted(teacher)))
    student.lm_head.weight.requires_grad_(head_trained)
    tokens = torch.randint(1, 1000, (8, 25), generator=torch.Generator().manual_seed(0))
    distillation = Distillation(student, chunk_size=50)
    with Largest() as forward:
        loss = distillation(tokens).loss
    with Largest() as backward:
        loss.backward()
    assert forward.elements == 50 * 1000
    assert 48 * 1000 <= backward.elements <= 50 * 1000


def test_only_rows_of_tokens_have_logits(tokens: torch.Tensor) -> None:
    mask = torch.zeros(2, 33, dtype=torch.long)
    mask[:, :3] = 1
    teacher = source()
    student = moved(converted(teacher))
    rows: list[int] = []
    student.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    Distillation(student, teacher, chunk_size=4)(tokens, mask)
    assert rows == [4, 2]


def test_padding_alone_costs_nothing(tokens: torch.Tensor) -> None:
    teacher = source()
    output = Distillation(moved(converted(teacher)), teacher)(tokens, torch.zeros_like(tokens))
    assert output.loss.item() == output.attention_loss.item() == output.kl_loss.item() == 0


@pytest.mark.parametrize("separate", [False, True])
def test_the_teacher_is_frozen_and_in_evaluation_mode(separate: bool, tokens: torch.Tensor) -> None:
    teacher = source(attention_dropout=0.5).train()
    student = moved(converted(teacher))
    distillation = Distillation(student, teacher if separate else None)
    for mode in (True, False, True):
        distillation.train(mode)
        assert {module.training for module in student.modules()} == {mode}
        assert not any(module.training for module in distillation.teacher.modules())
    assert not any(parameter.requires_grad for parameter in distillation.teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    distillation(tokens).loss.backward()
    assert all(parameter.grad is None for parameter in distillation.teacher.parameters())


def test_a_student_in_evaluation_mode_stays_so() -> None:
    assert not Distillation(converted(source())).student.training
    assert Distillation(converted(source()).train()).student.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_a_frozen_base_is_in_memory_once(separate: bool, tied: bool, dtype: torch.dtype) -> None:
    teacher = source(tie_word_embeddings=tied).to(dtype)
    student = train_gates_alone(moved(converted(teacher).to(dtype)))
    alone = sum(storages(student).values())
    distillation = Distillation(student, teacher if separate else None)
    together = storages(distillation.student, distillation.teacher)
    assert sum(together.values()) < 1.01 * alone
    head, embedding = distillation.teacher.lm_head.weight, distillation.teacher.model.embed_tokens.weight
    assert (head is embedding) == tied
    assert head is student.lm_head.weight
    assert {name for name, parameter in student.named_parameters() if parameter.requires_grad} == {
        name for name, _ in student.named_parameters() if "g_proj" in name
    }


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_trained_weights_are_the_student_s_own(tied: bool, separate: bool, tokens: torch.Tensor) -> None:
    teacher = source(tie_word_embeddings=tied)
    student = moved(converted(teacher))
    distillation = Distillation(student, teacher if separate else None)
    before = {name: tensor.clone() for name, tensor in distillation.teacher.state_dict().items()}
    assert storages(student).keys().isdisjoint(storages(distillation.teacher))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    distillation(tokens).loss.backward()
    optimizer.step()
    for name, tensor in distillation.teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert not torch.equal(tensor, student.state_dict()[name]), name


def test_what_is_trained_alone_is_copied(tokens: torch.Tensor) -> None:
    student = train_gates_alone(converted(source()))
    student.model.layers[1].mlp.requires_grad_(True)
    teacher = Distillation(student).teacher
    for name, parameter in teacher.named_parameters():
        of_student = student.get_parameter(name)
        assert torch.equal(parameter, of_student)
        assert (parameter is of_student) == ("layers.1.mlp" not in name), name


def test_a_teacher_of_other_weights_keeps_them() -> None:
    student = train_gates_alone(converted(source()))
    teacher = copy.deepcopy(ungated(student))
    with torch.no_grad():
        teacher.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    teacher.model.norm.weight.data = teacher.model.norm.weight.double()
    different = {"model.layers.0.mlp.up_proj.weight", "model.norm.weight"}
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    shared = share_frozen_parameters(student, teacher)
    expected = 0
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.dtype == before[name].dtype
        assert (parameter is student.get_parameter(name)) == (name not in different), name
        expected += 0 if name in different else 4 * parameter.numel()
    assert shared == expected
    assert share_frozen_parameters(student, teacher) == expected


def test_tied_weights_are_counted_once() -> None:
    student = train_gates_alone(converted(source(tie_word_embeddings=True)))
    teacher = copy.deepcopy(ungated(student))
    assert share_frozen_parameters(student, teacher) == 4 * sum(tensor.numel() for tensor in teacher.parameters())


@pytest.mark.parametrize("separate", [False, True])
def test_nothing_is_shared_if_not_wanted(separate: bool, tokens: torch.Tensor) -> None:
    teacher = source(tie_word_embeddings=True)
    student = train_gates_alone(moved(converted(teacher)))
    distillation = Distillation(student, teacher if separate else None, share_weights=False)
    assert storages(student).keys().isdisjoint(storages(distillation.teacher))
    assert distillation.teacher.lm_head.weight is distillation.teacher.model.embed_tokens.weight
    losses = distillation(tokens)
    expected = Distillation(student)(tokens)
    assert_close(losses.loss, expected.loss)


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def test_a_converted_model_ungated_is_its_source(
    options: dict[str, Any], share_weights: bool, tokens: torch.Tensor
) -> None:
    teacher = source(**options)
    student = moved(converted(teacher)).train()
    actual = ungated(student, share_weights=share_weights)
    assert not actual.training
    assert student.config.gate_position == ["G1"]
    assert actual.state_dict().keys() == teacher.state_dict().keys()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name
    assert not any(tensor.is_meta for tensor in (*actual.parameters(), *actual.buffers()))
    with torch.no_grad():
        assert_close(actual(tokens).logits, teacher(tokens).logits)
        assert (actual(tokens).logits - student(tokens).logits).abs().max() > 1e-3


def test_gates_at_every_position_are_left_out(tokens: torch.Tensor) -> None:
    positions = {"gate_position": ["G1", "G2", "G3", "G4", "G5"], "gate_granularity": "elementwise"}
    teacher = source()
    student = converted(teacher, **positions)
    for name, parameter in student.named_parameters():
        if ".g_" in name:
            parameter.data += 0.5
    with torch.no_grad():
        assert_close(ungated(student)(tokens).logits, teacher(tokens).logits)


def test_models_do_not_keep_hooks(tokens: torch.Tensor) -> None:
    distillation = Distillation(converted(source()))
    distillation(tokens)
    with pytest.raises(IndexError):
        distillation(tokens + 1000)
    assert not any(module._forward_hooks for module in distillation.modules())


def test_distilling_brings_gates_back(tokens: torch.Tensor) -> None:
    student = train_gates_alone(moved(converted(source())))
    distillation = Distillation(student)
    optimizer = torch.optim.AdamW([parameter for parameter in student.parameters() if parameter.requires_grad], lr=3e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = distillation(tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_weight": 0, "kl_weight": 0}, "nothing to learn"),
        ({"attention_weight": -1}, "attention_weight must not be negative, got -1"),
        ({"kl_weight": -0.5}, "kl_weight must not be negative, got -0.5"),
        ({"kl_weight": float("nan")}, "kl_weight must not be negative, got nan"),
    ],
)
def test_weights_that_make_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(gated_model(), **options)


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", 2), ("hidden_size", 24), ("vocab_size", 97)])
def test_teachers_of_another_size(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: the student has {SIZES[name]}, the teacher {value}"):
        Distillation(gated_model(), source(**{name: value}))


def test_an_ungated_student_needs_a_teacher() -> None:
    message = "a model without gates needs a teacher"
    with pytest.raises(ValueError, match=message):
        Distillation(source())
    with pytest.raises(ValueError, match=message):
        Distillation(GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES, gate_position=[])))
    Distillation(source(), source())


def test_attention_outputs_without_gradient_are_no_loss(tokens: torch.Tensor) -> None:
    """Reentrant checkpointing hides what is computed in it from autograd."""
    student = train_gates_alone(gated_model()).train()
    student.gradient_checkpointing_enable({"use_reentrant": True})
    student.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        Distillation(student)(tokens)
    Distillation(student, attention_weight=0)(tokens).loss.backward()


def test_what_the_teacher_shares_can_not_be_unfrozen(tokens: torch.Tensor) -> None:
    student = train_gates_alone(gated_model())
    distillation = Distillation(student)
    student.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="has been unfrozen"):
        distillation(tokens)


def test_models_inside_peft_are_refused() -> None:
    wrapped = get_peft_model(gated_model(), LoraConfig())
    with pytest.raises(ValueError, match="student must be a Transformers model, got PeftModel"):
        Distillation(wrapped)
    with pytest.raises(ValueError, match="PEFT's layers needs a teacher of its own"):
        Distillation(wrapped.get_base_model())
    Distillation(wrapped.get_base_model(), gated_model())


def test_the_teacher_is_no_part_of_the_state(tokens: torch.Tensor) -> None:
    distillation, other = (Distillation(train_gates_alone(gated_model())) for _ in range(2))
    with torch.no_grad():
        distillation.student.model.layers[0].self_attn.g_proj.bias.add_(1)
    state = distillation.state_dict()
    assert {name.partition(".")[0] for name in state} == {"student"}
    other.load_state_dict(state)
    assert torch.equal(other(tokens).loss, distillation(tokens).loss)
    del state["student.model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"student.model.norm.weight\""):
        other.load_state_dict(state)
