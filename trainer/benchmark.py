"""`python -m trainer.benchmark RUN_DIR --tasks hellaswag,gsm8k`: benchmarks of lm-eval on a model.

The scores are those of lm-eval's own `hf` model. They are kept in the folder of the run, for its report.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.templated import template_of
from data_pipeline.tokenizer import load_tokenizer
from moe.config import ConfigError, ModelConfig
from trainer.checkpoints.weights import load_model, ranks_for, selection_bias
from trainer.engine.cpu_products import fast_products
from trainer.ranks.launch import exit_with, launch
from trainer.ranks.runtime import DTYPES, Ranks
from trainer.settings.benchmarks import BenchmarksConfig, Score, score_rows, scores_file, write_scores
from trainer.settings.command import tells_mistakes
from trainer.settings.run_folder import hf_folder, pasted, run_of
from trainer.stages.asked import Reader
from trainer.stages.benchmarks import Benchmarks
from trainer.stages.orders import Room

_TOKENS = 16384  # of a forward


def measure(
    folder: Path, options: argparse.Namespace, ranks: Ranks, say: Callable[[str], object]
) -> list[Score]:
    """The scores of the model in a Hugging Face folder, on all ranks."""
    wanted = BenchmarksConfig(
        tasks=[task for task in options.tasks.split(",") if task],
        every_steps=1,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        include=options.include,
        rows_at_once=options.batch,
    )
    if problems := wanted.problems("--"):
        raise ConfigError(problems)
    length = ModelConfig.of_folder(folder).max_position_embeddings
    reader = Reader.of_folder(folder, load_tokenizer(folder), length)
    if options.chat:
        reader = reader._replace(template=template_of(folder))
    benchmarks = Benchmarks(wanted, reader, ranks, Room(options.batch, _TOKENS), say, "--")
    model = load_model(folder, ranks, DTYPES.get(options.dtype))
    with fast_products(ranks.device, model.lm_head.weight.dtype):
        return benchmarks.run(model, selection_bias(folder, ranks.device), _step(folder))


def _step(folder: Path) -> int | None:
    """The step of the checkpoint around a Hugging Face folder."""
    name = folder.resolve().parent.name
    is_checkpoint = folder.name == "hf" and name.startswith("step-")
    return int(name.removeprefix("step-")) if is_checkpoint and name[5:].isdigit() else None


def keep(scores: list[Score], source: Path, folder: Path, out: Path | None) -> str:
    """Write the scores to `out`, or else into the folder of the run; returns the last line for the person."""
    run_dir, step = run_of(source), _step(folder)
    if not scores:
        return "these tasks have no scores of their own; name the tasks of the group"
    if out is None and (step is None or not (run_dir / "config.yaml").is_file()):
        return f"nothing is written, as {source} is no run; --out FILE.json keeps the scores"
    path = out or scores_file(run_dir, step or 0)
    try:
        write_scores(path, scores, folder.resolve().parent.name if step is not None else str(source))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another with --out") from error
    return f"written to {path}" + ("" if out else f"; python -m trainer.report {pasted(run_dir)} shows them")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.benchmark", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder, checkpoint, or Hugging Face folder")
    parser.add_argument("--tasks", required=True, help="names of lm-eval, YAML files or folders, with commas")
    parser.add_argument("--include", action="append", default=[], help="folder with YAML files of more tasks")
    parser.add_argument("--limit", type=int, help="at most so many documents of a task")
    parser.add_argument(
        "--num-fewshot", type=int, help="examples before each question; else as the task says"
    )
    parser.add_argument("--chat", action="store_true", help="ask by the chat template of the model")
    parser.add_argument("--batch", type=int, default=64, help="texts at once on each rank")
    parser.add_argument("--nproc", type=int, default=1, help="ranks here, which share experts and texts")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; the checkpoint's if not given")
    parser.add_argument("--out", type=Path, help="JSON file for the scores, in place of the run's own")
    return parser


@tells_mistakes
def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if min(options.batch, options.nproc) < 1:
        parser.error("--batch and --nproc must be above 0")
    if not options.tasks.strip(","):
        parser.error("--tasks names no task")
    if options.nproc > 1 and "RANK" not in os.environ:
        return launch(["trainer.benchmark", *arguments], options.nproc, "auto")
    if options.out is not None and not options.out.parent.is_dir():
        what = f"--out {options.out}: there is no folder {options.out.parent}"
        raise ConfigError(f"{what}; make it, or name another file")
    ranks = ranks_for(options.source)
    folder = ranks.from_main(lambda: hf_folder(options.source))
    say = partial(print, file=sys.stderr, flush=True) if ranks.is_main else lambda line: None
    scores = measure(folder, options, ranks, say)
    last = ranks.from_main(lambda: keep(scores, options.source, folder, options.out))
    table = Table("task", "metric", "value", "")
    for row in score_rows(scores):
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)
    print(last)
    ranks.leave()
    return 0


if __name__ == "__main__":
    exit_with(main(sys.argv[1:]))
