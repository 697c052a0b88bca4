"""--prompts reads what sources of prompts read, and --out changes no file that is not the command's own."""

import json
import os

import pytest

ROW = {"prompt": "fox", "answer": "é"}
OWN = ROW | {"completion": " dog {}", "truncated": True, "number": 0}
LINE = json.dumps(OWN, ensure_ascii=False).encode()
MINE = json.dumps(ROW | {"completion": "mine"}, ensure_ascii=False).encode()


@pytest.fixture
def ask(say, tmp_path):
    """`ask(OUT)`: exit code and error of the command for the two rows of `in.jsonl`."""
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, [ROW, {"prompt": "dog"}])))

    def run(out):
        code, _, error = say("--prompts", tmp_path / "in.jsonl", "--out", out, "--tokens", 2)
        return code, error

    return run


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def changed(**more):
    return json.dumps(OWN | more).encode()


@pytest.mark.parametrize("name", ["out.jsonl", ".out.jsonl.rank-1"])
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"my notes", 1),
        (b"my notes\nof today", 1),
        (b'{\n  "size": 3\n}', 1),
        (b"\n", 1),
        (LINE + b"\nmy notes", 2),  # what follows a line of ours
        (LINE + b"\n\n", 2),
        (json.dumps(ROW).encode(), 1),  # a copy of the prompts
        (MINE, 1),
        (MINE + b"\n", 1),
        (changed(score=1) + b"\n", 1),
        (changed(number=[0]) + b"\n", 1),
        (changed(number=2) + b"\n", 1),
        (changed(answer="e") + b"\n", 1),
        (b'["number"]\n', 1),
        (b"\xff\n", 1),
    ],
)
def test_a_file_of_another_is_left_as_it_is(ask, tmp_path, name, text, line):
    other = tmp_path / name
    other.write_bytes(text)
    code, error = ask(tmp_path / "out.jsonl")
    assert (code, other.read_bytes()) == (2, text)
    law = f"{other}:{line} is no completion of a row that {tmp_path / 'in.jsonl'} has; it is left as it is"
    assert error == f"{law}; name another file for --out\n"
    assert sorted(tmp_path.glob("*out*")) == [other], "nothing is made beside it"


@pytest.mark.parametrize("name", ["out.jsonl", ".out.jsonl.rank-1"])
@pytest.mark.parametrize("size", [0, 1, 12, LINE.index(b"\xc3") + 1, LINE.index(b" dog") + 5, len(LINE)])
@pytest.mark.parametrize("whole", [False, True])
def test_a_torn_line_of_its_own_is_written_again(ask, tmp_path, name, size, whole):
    second = json.dumps({"prompt": "dog", "completion": "x", "truncated": True, "number": 1}).encode() + b"\n"
    (tmp_path / name).write_bytes((second if whole else b"") + LINE[:size])
    out = tmp_path / "out.jsonl"
    assert ask(out)[0] == 0
    assert sorted(line["number"] for line in lines(out)) == [0, 1]
    assert out.read_bytes().startswith(second) is whole
    assert list(tmp_path.glob("*out*")) == [out]


def test_out_is_a_file_of_its_own(ask, tmp_path):
    prompts = tmp_path / "in.jsonl"
    before, link, folder = prompts.read_bytes(), tmp_path / "link", tmp_path / "folder"
    link.symlink_to(prompts)
    folder.mkdir()
    remedy = "it is left as it is; name another file for --out\n"
    for out in (prompts, link):
        assert ask(out) == (2, f"{out} is the file of --prompts; {remedy}")
    for out in (folder, "/dev/null"):
        assert ask(out) == (2, f"{out} is no regular file; {remedy}")
    long = tmp_path / ("a" * 300)
    assert ask(long) == (2, f"--out {long} cannot be used (File name too long); name another file\n")
    assert prompts.read_bytes() == before
    assert not list(folder.iterdir())


def test_rows_with_nan_are_done_once(say, tmp_path):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "fox", "score": NaN, "of": [1.0, 1e400]}\n')
    for new in (1, 0):
        code, said, _ = say("--prompts", prompts, "--out", out, "--tokens", 2)
        assert (code, said) == (0, f"{out} holds the completions of 1 prompts, {new} of them new\n")


def test_prompts_are_read_as_sources_of_prompts_are(say, tmp_path):
    """A byte order mark, blank lines, and a prompt that is a list of messages."""
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = [{"role": "user", "content": "fox"}]
    rows = [{"prompt": asked}, {"prompt": "dog", "messages": None}, {"messages": asked}]
    prompts.write_text("\ufeff" + "\n\n \n".join(map(json.dumps, rows)) + "\n\n")
    for new in (3, 0):
        code, said, error = say("--prompts", prompts, "--out", out, "--tokens", 4)
        assert (code, said) == (0, f"{out} holds the completions of 3 prompts, {new} of them new\n"), error
    found = {line["number"]: line for line in lines(out)}
    assert sorted(found) == [0, 3, 6], "numbers are those of lines"
    assert found[0]["completion"] == found[6]["completion"]
    prompts.write_text('\n{"prompt": [{"role": "king", "content": "a"}]}\n')
    code, _, error = say("--prompts", prompts, "--out", out)
    assert code == 2
    assert "in.jsonl:2: messages[0]: role 'king'" in error


def test_prompts_may_come_from_a_pipe(say, tmp_path):
    """Whose size is not known before its end."""
    reading, writing = os.pipe()
    os.write(writing, b'{"prompt": "fox"}\n')
    os.close(writing)
    try:
        code, said, _ = say("--prompts", f"/dev/fd/{reading}", "--out", tmp_path / "out.jsonl", "--tokens", 2)
    finally:
        os.close(reading)
    assert (code, "of 1 prompts, 1 of them new" in said) == (0, True)
