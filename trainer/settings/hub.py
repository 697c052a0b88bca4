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
