"""Secrets in text: replaced by *** where people read it, refused where it must stay exact. Torch-free.

A secret is the value of an environment variable whose name sounds like one, a token of a known form, or what
is assigned to a name that sounds like one.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.settings.typed import each_text

HIDDEN = "***"
_SHORTEST = 8  # characters of a value of the environment: shorter ones occur in ordinary text
_WORDS = r"(?:KEY|TOKEN(?!IZ|S)|SECRET|PASSW|CREDENTIAL|JWT)"
_NAME = re.compile(_WORDS, re.IGNORECASE)
_FORMS = re.compile(
    r"""
    \b(?:hf_[A-Za-z0-9]{20,}                  # Hugging Face
    | sk-[\w-]{20,}                           # OpenAI, Anthropic
    | gh[opsur]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{20,}
    | A[KS]IA[A-Z0-9]{16}                     # AWS
    | xox[a-z]-[\w-]{10,}                     # Slack
    | wandb_v\d_\w{20,}
    | eyJ[\w-]{10,4000}\.[\w-]{10,4000}\.[\w-]{10,})   # JSON web tokens
    | (?<=wandb\ login\ )[0-9a-f]{40}
    | (?<=://)[^\s/:@]+:[^\s/@]+(?=@)         # an address with a password
    | (?<=earer\ )[\w.~+/=-]{16,}
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
# A value that is written out: no expression of a shell or of Python, such as $(cat file) or read(file).
_QUOTED = r"""(?<=["'])(?![${(])[^"'\n]{6,4000}(?=["'])"""
_BARE = r"""[\w.+/~@%^&*!-][^\s"'`;,(){}\[\]<>|$\\]{5,4000}+(?![(\[{$])"""
_VALUE = f"(?:{_QUOTED}|{_BARE})"
_LOWER = r"(?:(?:api|access|secret|private)_?key|(?:api|access|auth|hf|github)_?token|secret|password|passwd)"
# A whole word, so that a search takes linear time.
_NAMES = rf"\b(?:(?=[A-Z0-9_]*{_WORDS})[A-Z0-9_]++|(?i:(?=\w*{_LOWER})\w++))"
_NO_FILE = r"(?<!(?i:_path))(?<!(?i:_file))(?<!(?i:_dir))"
# NAME=value, NAME: value, NAME: str = value, "NAME": "value", environ["NAME"] = "value"
_ASSIGNED = re.compile(
    rf"""({_NAMES}{_NO_FILE})(["'\]]*(?:[ \t]*:[ \t]*\w+)?[ \t]*[:=][ \t]*["']?){_VALUE}"""
)
_OPTION = re.compile(rf"""(--(?:[\w-]{{1,40}}-)?(?:api-?key|token|secret|password))([ =]["']?){_VALUE}""")


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret: *KEY*, *TOKEN*, *SECRET*, *PASSW* and the like."""
    return _NAME.search(name) is not None


def secret_in(text: str) -> str | None:
    """What secret a text holds, in words that do not repeat it; None if there is none."""
    for name, value in _of_environment():
        if value in text:
            return f"the value of the environment variable {name}"
    if _FORMS.search(text):
        return "what looks like a token or a key"
    match = _ASSIGNED.search(text) or _OPTION.search(text)
    return f"a value of {match[1]}" if match else None


def redacted(text: str) -> str:
    """The text with every secret replaced by ***."""
    for _, value in _of_environment():
        text = text.replace(value, HIDDEN)
    text = _FORMS.sub(HIDDEN, text)
    for assigned in (_ASSIGNED, _OPTION):
        text = assigned.sub(rf"\g<1>\g<2>{HIDDEN}", text)
    return text


def without_secrets(value: Any) -> Any:
    """The same dictionaries and lists with every text `redacted`."""
    return each_text(value, redacted)


def unsafe_settings(settings: Mapping[str, Any]) -> list[str]:
    """A line for each setting that must not be written to a run folder: it holds a secret."""
    found = []
    for key, setting in settings.items():
        for text in _texts(setting):
            if what := secret_in(text):
                law = "settings are stored in the run folder and shown in W&B"
                remedy = "remove it, and export it in your shell, or read it there from a file of mode 600"
                found.append(f"{key} holds {what}, but {law}; {remedy}")
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    for of in value if isinstance(value, list) else ():
        yield from _texts(of)
    if isinstance(value, str):
        yield value


def _of_environment() -> list[tuple[str, str]]:
    """Names and values of the secrets in the environment, the longest first. A path is no secret."""
    named = ((name, value.strip()) for name, value in os.environ.items() if is_secret_name(name))
    found = [(name, value) for name, value in named if len(value) >= _SHORTEST and not os.path.exists(value)]
    return sorted(found, key=lambda pair: -len(pair[1]))
