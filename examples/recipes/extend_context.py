"""
Extend a model's context by the recipe of the gated attention paper (arXiv 2505.06708, Table 5), and measure the loss.

    python examples/recipes/extend_context.py [--config SETTINGS.toml] [--output FOLDER]

    # several GPUs; the comments of the configuration name the requirements
    accelerate launch --config_file examples/shared/accelerate_fsdp2.yaml examples/recipes/extend_context.py \
        --config examples/recipes/extend_context_full.toml --output build/extend_context_full

1. Raise the RoPE base and continue training at the longer length: OUTPUT/trained. A model from scratch is first
   trained at the short length with its own base: OUTPUT/short.
2. Extend the context further by YaRN, without training: OUTPUT/yarn.
3. Measure the loss on held-out text by the number of tokens before. The models are the model before, with the raised
   base without training, trained, and with YaRN. The result is a table, OUTPUT/results.json and
   OUTPUT/loss_by_position.png.

An interrupted run resumes when started again with the same output. It loads the last saved state (OUTPUT/state) and
takes the next batch. examples/recipes/extend_context_settings.py explains the settings. The plot needs matplotlib:
pip install '.[plot]'.

The logits of one chunk of tokens are in memory at once. Attention is SDPA without a mask. Sources with sliding windows
(Mistral) use a mask of [length, length] bits.
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
    """Return the checkpoint whose context is extended."""
    return Path(settings.model) if settings.model else output / "short"


def train_stage(run: Run, model: PreTrainedModel, stage: Stage) -> None:
    """Train all weights of a model, and save the result as OUTPUT/name."""
    checkpoint_layers(model)
    groups = gate_param_groups(model, stage.schedule.learning_rate, weight_decay=0.1)
    module = train(run, WindowLoss(model), groups, stage)
    save_model(run, module, stage.name)
    run.accelerator.free_memory(module)


def extend(run: Run, settings: Settings) -> None:
    """Run the stages of the recipe, except stages whose checkpoint exists."""
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
    """Yield name and model of each stage, with a single model in memory."""
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    start = start_of(settings, run.output)
    yield "before", load(start, dtype)
    model = load(start, dtype)
    extend_context(model, settings.length, "rope_base", settings.rope_theta)
    yield "base raised", model
    yield "trained", load(run.output / "trained", dtype)
    yield "YaRN", load(run.output / "yarn", dtype)


def evaluate(run: Run, settings: Settings) -> dict[str, torch.Tensor]:
    """Return each model's loss by position, [yarn_length] in nats, mean over windows. Processes share the windows."""
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
    """Return the folder of the tokenizer: given, the model's, or OUTPUT/tokenizer."""
    return Path(settings.tokenizer or settings.model or output / "tokenizer")


def prepare_text(settings: Settings, output: Path) -> PackedText:
    """
    Return the text's tokens, which are written once. Train a tokenizer once if none is given.

    Raises:
        SettingsError: if the text is too short.
    """
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
        raise SettingsError(
            f"length must be less than the text's {text.training_size:,} training tokens, got {settings.length}; use a "
            "longer text"
        )
    if text.held_out_size <= settings.yarn_length:
        raise SettingsError(
            f"yarn_length must be less than the text's {text.held_out_size:,} held-out tokens, got "
            f"{settings.yarn_length}; use a longer text"
        )
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(__file__).with_name("extend_context_small.toml"),
        help="TOML file of settings (default: extend_context_small.toml)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/extend_context"),
        help="folder for all results (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    disable_progress_bar()  # bars of Transformers would mix with training bars
    try:
        settings = read_settings(parsed.config)
        accelerator = make_accelerator(settings.mixed_precision, settings.gradient_accumulation_steps)
        with accelerator.main_process_first():
            check_run_settings(asdict(settings) | {"processes": accelerator.num_processes}, parsed.output)
            text = prepare_text(settings, parsed.output)
    except (OSError, ValueError) as error:  # SettingsError, and errors of texts and tokenizers
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
