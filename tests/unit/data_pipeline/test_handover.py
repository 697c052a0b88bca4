"""The hand-over from datatrove in docs/data.md: its recipe reads what datatrove's JsonlWriter writes."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from data_pipeline.prepare import prepare
from data_pipeline.shards import verify
from slurm.config import SubmitConfig
from trainer.settings.typed import typed

RECIPE = re.compile(r"python -m slurm (job=prepare name=clean .*?)```", re.S)


def test_the_recipe_reads_a_folder_of_datatrove(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 0.10.1 writes one file for each task, as here, with some of them in folders of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("00000", "00001", "en/00000"):
        path = Path(f"clean/{name}.jsonl.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"text": f"Row {n} of {name}.", "id": f"p.jsonl/{n}", "metadata": {"file_path": "/raw/p.jsonl"}}
            for n in range(100)
        ]
        with gzip.open(path, "wt") as file:
            file.write("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    (recipe,) = RECIPE.findall((repository / "docs/data.md").read_text())
    with initialize_config_module("conf", version_base="1.3"):
        tokenizer = ["data.tokenizer=null", "data.tokenizer_vocab_size=512"]
        cfg = compose("submit", [*shlex.split(recipe.replace("\\\n", " ")), *tokenizer])
    config = typed(SubmitConfig, cfg)
    config.check()
    config.data.num_workers = 1
    source = prepare(config.data, config.model.vocab_size, config.seed).sources["clean"]
    assert sum(shard.documents for of in source.shards.values() for shard in of) == 300
    assert source.skipped == {}
    verify(Path(config.data.dir))
