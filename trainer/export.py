"""`python -m trainer.export RUN_DIR|CHECKPOINT OUT`: the weights as a folder for the Hugging Face hub."""

import argparse
import re
import sys
from pathlib import Path

from moe.config import ModelConfig
from moe.hf import SafetensorError
from trainer.checkpoints.export import DTYPES, export
from trainer.checkpoints.folder import reading
from trainer.settings.command import tells_mistakes
from trainer.settings.hub import push
from trainer.settings.run_folder import hf_folder, run_of


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is not a size; write 5GB or 300MB")
    return int(float(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]])


@tells_mistakes
def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder (newest checkpoint), checkpoint, or HF folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder, or one of an unfinished export")
    parser.add_argument("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="e.g. 300MB")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: as in the checkpoint; fp8 in blocks"
    )
    parser.add_argument("--push", metavar="NAME", help="upload OUT to this repository, private if new")
    parser.add_argument("--dry-run", action="store_true", help="with --push: only say what would be uploaded")
    options = parser.parse_args(arguments)
    if options.dry_run and options.push is None:
        parser.error("--dry-run belongs to --push NAME")
    try:
        folder = hf_folder(options.source)
        with reading(folder):
            export(folder, options.out, options.max_shard_size, DTYPES.get(options.dtype))
        run_dir = run_of(options.source)
        if (run_dir / "config.yaml").is_file():
            from trainer.monitor.card import write_card  # matplotlib is slow to import

            write_card(run_dir, options.out, ModelConfig.of_folder(options.out))
        if options.push is not None:
            print(push(options.out, options.push, dry_run=options.dry_run))
    except (OSError, SafetensorError) as error:
        print(f"the export is incomplete: {error}; run the same command again to continue", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
