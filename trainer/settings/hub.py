"""Models of the Hugging Face hub, by name. Torch-free."""

import logging
import os
import re
from pathlib import Path

from moe.config import ConfigError

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_hub_name(source: str) -> bool:
    """Whether a source is NAME/MODEL or NAME/MODEL@REVISION, and nothing here has this name."""
    return _NAME.fullmatch(source) is not None and not os.path.exists(source)


def fetch(name: str, *, weights: bool = True, here: bool = False) -> Path:
    """The folder of a model in the hub's cache, where what is missing is fetched; `here`: nothing is fetched.

    Without `weights`, only configuration and tokenizer. Raises ConfigError if the hub does not give it.
    """
    from huggingface_hub import snapshot_download  # slow to import, and only these models need it

    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)  # Hydra's logging would show every request
    model, _, revision = name.partition("@")
    files = ["*.json", "*.safetensors"] if weights else ["*.json"]
    try:
        folder = snapshot_download(
            model, revision=revision or None, allow_patterns=files, local_files_only=here
        )
    except Exception as error:  # the library raises exceptions of many types
        what = f"{name} is no folder here, and the hub does not give it ({' '.join(str(error).split())})"
        remedy = "name a folder, or MODEL[@REVISION] of the hub"
        raise ConfigError(f"{what}; {remedy}; without a network, first `hf download {model}`") from error
    return Path(folder)


def pinned(name: str) -> str:
    """The name with the commit that it means now, so that a run that starts later gets the same weights."""
    return f"{name.partition('@')[0]}@{fetch(name, weights=False).name}"


def push(folder: Path, name: str, *, dry_run: bool) -> str:
    """Upload a folder to the repository `name` of the hub, private if it is new; returns what was done.

    With `dry_run`, what would be done. Files that the repository has already are not sent again. Raises
    ConfigError if the hub refuses.
    """
    from huggingface_hub import HfApi

    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    total = sum(path.stat().st_size for path in files) / 1e9
    listed = "\n".join(f"  {path.stat().st_size:>15,}  {path.name}" for path in files)
    what = f"{len(files)} files, {total:.2f} GB, to {name} (private if it is new)"
    if dry_run:
        return f"would upload {what}:\n{listed}"
    try:
        api = HfApi()
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=[".*"])
    except Exception as error:  # the library raises exceptions of many types
        said = " ".join(str(error).split())
        remedy = "log in by `hf auth login` with a token that may write, and run the same command again"
        raise ConfigError(f"--push {name}: the hub refuses ({said}); {remedy}") from error
    return f"uploaded {what}: {url}"
