"""
The paper's recipe for a longer context (arXiv 2505.06708, Table 5), from a checkpoint to a table of losses.

    python examples/recipes/extend_context.py [--config SETTINGS.toml] [--output FOLDER]

    # several GPUs; the configuration's comments say what it needs
    accelerate launch --config_file examples/shared/accelerate_fsdp2.yaml examples/recipes/extend_context.py \
        --config examples/recipes/extend_context_full.toml --output build/extend_context_full

1. The base of RoPE is raised, and training goes on at the longer length: OUTPUT/trained. (A model from scratch is
   first trained at the short length, with the base as it was: OUTPUT/short.)
2. YaRN extends the context further, without training: OUTPUT/yarn.
3. The loss on held-out text, by the number of tokens before, of the model before, with the base raised and no training,
   trained, and with YaRN: a table, OUTPUT/results.json and OUTPUT/loss_by_position.png.

Started again with the same output, it goes on where it was: from the last state that was saved (OUTPUT/state), with the
batch that would have come next. Settings are explained in examples/recipes/extend_context_settings.py. The plot needs
matplotlib: pip install '.[plot]'.

Logits are held one chunk at a time. Attention is sdpa's, without a mask; of a source with sliding windows (Mistral) it
has one of [length, length] bits.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils.logging import disable_progress_bar

from modeling_gated import GatedLlamaForCausalLM
from modeling_gated.configuration import extend_context
from modeling_gated.evaluation import loss_by_position
from modeling_gated.training import gate_param_groups
from modeling_gated.training.loop import Run, Stage, check_run_settings, make_accelerator, train


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from examples, if run by its path

from examples.recipes.extend_context_settings import Settings, SettingsError, read_settings, starting_config
from examples.shared.accelerate_training import WindowLoss, checkpoint_layers, load, save_model, write_checkpoint
from examples.shared.loss_report import RESULTS, print_table, write_report
from examples.shared.packed_text import PackedText, train_tokenizer, write_tokens


def start_of(settings: Settings, output: Path) -> Path:
    """The checkpoint whose context is extended."""
    return Path(settings.model) if settings.model else output / "short"


def train_stage(run: Run, model: PreTrainedModel, stage: Stage) -> None:
    """Train a whole model, and save it as OUTPUT/name."""
    checkpoint_layers(model)
    groups = gate_param_groups(model, stage.schedule.learning_rate, weight_decay=0.1)
    module = train(run, WindowLoss(model), groups, stage)
    save_model(run, module, stage.name)
    run.accelerator.free_memory(module)


def extend(run: Run, settings: Settings) -> None:
    """The recipe's stages, but for those whose checkpoint is there."""
    scratch, start = settings.from_scratch, start_of(settings, run.output)
    if scratch is not None and not start.is_dir():
        set_seed(settings.seed)
        tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
        config = starting_config(settings)
        config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
        train_stage(run, GatedLlamaForCausalLM(config), Stage("short", scratch))
    if not (run.output / "trained").is_dir():
        model = load(start)
        extend_context(model, settings.length, "rope_base", settings.rope_theta)
        train_stage(run, model, Stage("trained", settings))
    if run.accelerator.is_main_process and not (run.output / "yarn").is_dir():
        model = load(run.output / "trained")
        extend_context(model, settings.yarn_length, "yarn")
        write_checkpoint(run, model, "yarn")
    run.accelerator.wait_for_everyone()


def compared_models(run: Run, settings: Settings) -> Iterator[tuple[str, PreTrainedModel]]:
    """Each stage's model, one in memory at a time."""
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    start = start_of(settings, run.output)
    yield "before", load(start, dtype)
    model = load(start, dtype)
    extend_context(model, settings.length, "rope_base", settings.rope_theta)
    yield "base raised", model
    yield "trained", load(run.output / "trained", dtype)
    yield "YaRN", load(run.output / "yarn", dtype)


def evaluate(run: Run, settings: Settings) -> dict[str, torch.Tensor]:
    """The loss of each model at each position, [yarn_length], the mean over windows that the processes share out."""
    accelerator = run.accelerator
    windows = run.text.held_out_windows(settings.yarn_length, settings.evaluation_windows)
    losses = {}
    for name, model in compared_models(run, settings):
        model.to(accelerator.device).eval()
        own_windows = windows[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros(settings.yarn_length)
        with tqdm(
            desc=f"evaluating {name}",
            total=own_windows[:, 1:].numel(),
            unit=" tokens",
            disable=not accelerator.is_main_process,
        ) as progress:
            for window in own_windows:
                total += loss_by_position(model, window, advance=progress.update)
        losses[name] = accelerator.reduce(total.to(accelerator.device), "sum").cpu() / len(windows)
    return losses


def tokenizer_folder(settings: Settings, output: Path) -> Path:
    return Path(settings.tokenizer or settings.model or output / "tokenizer")


def prepare_text(settings: Settings, output: Path) -> PackedText:
    """The text's tokens, and a tokenizer where none is given; made once."""
    folder = tokenizer_folder(settings, output)
    if settings.from_scratch is not None and folder == output / "tokenizer" and not folder.is_dir():
        partial = output / "tokenizer.partial"
        train_tokenizer(settings.text, settings.from_scratch.vocabulary_size).save_pretrained(partial)
        partial.rename(folder)
    path = output / "tokens.bin"
    if not path.is_file():
        write_tokens(settings.text, AutoTokenizer.from_pretrained(folder), path)
    text = PackedText(path)
    if text.training_windows(settings.length) < 1:
        raise SettingsError(f"length={settings.length}: the text has only {text.training_size:,} tokens to train on")
    if text.held_out_size <= settings.yarn_length:
        raise SettingsError(f"yarn_length={settings.yarn_length}: only {text.held_out_size:,} tokens are held out")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("extend_context_small.toml"))
    parser.add_argument("--output", type=Path, default=Path("build/extend_context"))
    parsed = parser.parse_args(arguments)
    disable_progress_bar()  # of Transformers, beside those here
    try:
        settings = read_settings(parsed.config)
        accelerator = make_accelerator(settings.mixed_precision, settings.gradient_accumulation_steps)
        with accelerator.main_process_first():
            check_run_settings(asdict(settings) | {"processes": accelerator.num_processes}, parsed.output)
            text = prepare_text(settings, parsed.output)
    except (OSError, ValueError) as error:  # SettingsError, and what texts and tokenizers are refused with
        sys.exit(f"error: {error}" if PartialState().is_main_process else 1)

    run = Run(
        parsed.output,
        accelerator,
        text,
        tokenizer_folder(settings, parsed.output),
        settings.warmup_steps,
        settings.gradient_accumulation_steps,
        settings.save_every,
        settings.seed,
    )
    extend(run, settings)
    if not (run.output / RESULTS).is_file():
        losses = evaluate(run, settings)
        if accelerator.is_main_process:
            short = starting_config(settings).max_position_embeddings
            write_report(
                losses, {"before": short, "trained": settings.length, "YaRN": settings.yarn_length}, run.output
            )
    if accelerator.is_main_process:
        print_table(run.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
