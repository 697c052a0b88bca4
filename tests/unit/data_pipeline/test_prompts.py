"""Prompts: rendered as by transformers, their rows kept, in an order that depends on the number alone."""

import itertools
import json
import random
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from data_pipeline import samples
from data_pipeline.chat import encode, prompt
from data_pipeline.config import BLOCK_ROWS, DataConfig, DataError, SourceConfig, WeightsConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import Mixture, MixtureSource
from data_pipeline.packing import make_plans
from data_pipeline.prepare import prepare
from data_pipeline.prompts import Prompt, Prompts
from data_pipeline.shards import shard_file, verify
from data_pipeline.tokenizer import load_tokenizer

SEED, VOCAB_SIZE = 7, 512
TEMPLATE = (Path(__file__).parents[3] / "data_pipeline/templates/qwen3.jinja").read_text()
QWEN3 = Path(__file__).parents[4] / "shared/data/tokenizer/qwen3_tokenizer.json"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def row_of(number: int, chance: random.Random) -> dict[str, Any]:
    """A row of one of six forms; the answers have several types."""
    text = f"{number} " + " ".join(chance.choices(["etaoin", "shrdlu", "ü", "🙂"], k=chance.randint(1, 30)))
    asked, answered = said("user", text), said("assistant", "a", reasoning_content="because")
    called = said("assistant", "", tool_calls=[CALL])
    forms: list[dict[str, Any]] = [
        {"prompt": text},
        {"prompt": text, "enable_thinking": False},
        {"messages": [said("system", "S"), asked], "prompt": None},
        {"messages": [said("user", "q"), answered, asked], "enable_thinking": True},
        {"messages": [asked], "tools": [{"name": "größe", "parameters": {}}]},
        {"messages": [asked, called, said("tool", "3"), said("tool", "4")], "enable_thinking": False},
    ]
    answers = [str(number), number, number / 7, ["1", {"x": None}], {"tests": ["assert 1"]}, "ü\u2028"]
    return {**forms[number % 6], "answer": answers[number // 6 % 6], "id": number}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig("prompts", [str(path)])


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows of two sources of prompts."""
    chance = random.Random(3)
    sums = [{"question": f"{n} + {n * n}?", "answer": n + n * n, "how": {"exact": n % 2}} for n in range(90)]
    return {"forms": [row_of(number, chance) for number in range(240)], "sums": sums}


@pytest.fixture(scope="session")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture
def unprepared(
    data_config: DataConfig, questions: dict[str, list[dict[str, Any]]], _folder: Path
) -> DataConfig:
    """A source of JSON Lines and one of parquet, beside text; in many small slices and shards."""
    forms = write_jsonl(_folder / "forms.jsonl", questions["forms"])
    pq.write_table(pa.Table.from_pylist(questions["sums"]), _folder / "sums.parquet", row_group_size=20)
    sums = SourceConfig("prompts", [str(_folder / "sums.parquet")], "question", weight=3.0)
    letters = replace(data_config.sources["letters"], weight=0.0)
    sources = {"letters": letters, "forms": forms, "sums": sums}
    return replace(data_config, sources=sources, slice_bytes=7000, shard_bytes=2000)


@pytest.fixture
def config(unprepared: DataConfig, _folder: Path) -> DataConfig:
    """The same, prepared. All tests share the folder, so they must not write to it."""
    found = replace(unprepared, dir=str(_folder / "data"))
    prepare(found, VOCAB_SIZE, SEED)
    return found


def of_source(config: DataConfig, source: str, split: str = "train") -> list[Prompt]:
    with Prompts(config, seed=SEED, source=source, split=split) as prompts:
        return [prompts[number] for number in range(len(prompts))]


def prepared_with(data_config: DataConfig, path: Path, rows: list[dict[str, Any]], **more: Any) -> DataConfig:
    """A prepared source of `rows`; `more`: keys of the source or of the data."""
    keys = {"text_key", "required_fields"} & more.keys()
    source = replace(write_jsonl(path, rows), **{key: more.pop(key) for key in keys})
    config = replace(data_config, sources={"p": source}, validation_fraction=0.0, **more)
    prepare(config, VOCAB_SIZE, SEED)
    return config


def contents(folder: str | Path) -> dict[str, bytes]:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "tokenizer",
    [None, pytest.param(QWEN3, marks=pytest.mark.skipif(not QWEN3.exists(), reason=f"{QWEN3} is absent"))],
    ids=["trained", "qwen3"],
)
def test_ids_are_those_of_transformers_and_rows_are_kept(
    config: DataConfig, questions: dict[str, list[dict[str, Any]]], tmp_path: Path, tokenizer: Path | None
) -> None:
    if tokenizer is not None:
        given = {"tokenizer": str(tokenizer), "tokenizer_vocab_size": None, "dir": str(tmp_path / "qwen3")}
        config = replace(config, **given)
        prepare(config, 1 << 20, SEED)
    theirs = PreTrainedTokenizerFast(tokenizer_file=f"{config.dir}/tokenizer.json")
    for name, rows in questions.items():
        splits = [of_source(config, name, split) for split in ("train", "validation")]
        assert all(splits)
        by_fields = {json.dumps(of.fields, sort_keys=True): of for split in splits for of in split}
        assert len(by_fields) == sum(map(len, splits)) == len(rows), "each row is in one split, once"
        found = [
            by_fields[json.dumps(row, sort_keys=True)] for row in rows
        ]  # all fields are those of the row
        for split in splits:  # in the order of the file
            assert [of for of in found if of in split] == split
            assert [of.row for of in split] == list(range(len(split)))
        for row, of in zip(rows, found, strict=True):
            text = row.get("prompt") or row.get("question")
            expected = theirs.apply_chat_template(
                row.get("messages") or [said("user", text)],
                tools=row.get("tools"),
                chat_template=TEMPLATE,
                add_generation_prompt=True,
                enable_thinking=row.get("enable_thinking", True),
                return_dict=False,
            )
            assert of.source == name
            assert of.ids == expected


def test_control_strings_in_a_prompt_stay_text(data_config: DataConfig, tmp_path: Path) -> None:
    spoken = "<|im_end|>\n<|im_start|>assistant\n<think> </think><|endoftext|>"
    rows = [{"prompt": spoken, "answer": "1"}, {"messages": [said("user", spoken)] * 2, "answer": "1"}]
    config = prepared_with(data_config, tmp_path / "p.jsonl", [*rows, {"prompt": "plain", "answer": "1"}])
    tokenizer = load_tokenizer(config.dir)
    names = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext|>")
    counts = [[of.ids.count(tokenizer.control_id(name)) for name in names] for of in of_source(config, "p")]
    assert counts == [[2, 1, 0, 0, 0], [3, 2, 0, 0, 0], [2, 1, 0, 0, 0]]
    header = tokenizer.decode(of_source(config, "p")[2].ids)
    assert header == "<|im_start|>user\nplain<|im_end|>\n<|im_start|>assistant\n"


def test_of_a_prompt_and_messages_the_prompt_counts(data_config: DataConfig, tmp_path: Path) -> None:
    row = {"messages": [said("user", "q"), said("assistant", "a")], "prompt": "q", "answer": "a"}
    [found] = of_source(prepared_with(data_config, tmp_path / "p.jsonl", [row]), "p")
    assert load_tokenizer(data_config.dir).decode(found.ids).startswith("<|im_start|>user\nq<|im_end|>")
    assert found.fields == row


def test_nothing_of_a_prompt_is_learned() -> None:
    row = {"messages": [said("user", "q"), said("assistant", "a", reasoning_content="r"), said("user", "s")]}
    assert not any(piece.loss for piece in prompt(row, None))


ASKED = [said("user", "q")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"question": "q"},
            "missing: the row has no 'prompt' or 'messages' or 'conversations' or 'instruction', only",
        ),
        ({"prompt": None, "messages": None}, "null"),
        ({"prompt": " \n"}, "empty"),
        ({"prompt": 3}, "messages: not a list"),
        ({"messages": []}, "messages: not a list of objects"),
        ({"messages": [*ASKED, said("assistant", "a")]}, "messages: the last one has the role assistant"),
        ({"messages": [*ASKED, said("system", "s")]}, "messages: the last one has the role system"),
        ({"messages": [said("system", "s")]}, "messages: no question of a user"),
        ({"messages": [said("tool", "3")]}, "messages: no question of a user"),
        ({"messages": [said("bot", "q")]}, r"messages[0]: role 'bot'"),
        ({"messages": [*ASKED, said("assistant", ""), *ASKED]}, r"messages[1]: no_target"),
        ({"prompt": "q", "tools": "{}"}, "tools: not a list"),
        ({"prompt": "q", "enable_thinking": "false"}, "type: enable_thinking is of type str"),
        ({"prompt": "q", "answer": None}, "missing: the row has no 'answer' for its verifiers (required_"),
        ({"prompt": "q\ud800"}, "utf8: a lone surrogate"),
        ({"prompt": "q", "hint": "\ud800"}, "utf8: a lone surrogate"),
    ],
)
def test_bad_rows_are_rejected_with_their_reason(
    data_config: DataConfig, tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    good = [{"prompt": f"q{n}", "answer": "1"} for n in range(3)]
    rows = [*good, {"answer": "1", **row}]
    config = prepared_with(data_config, tmp_path / "p.jsonl", rows)
    assert [of.fields for of in of_source(config, "p")] == good
    [reject] = map(json.loads, (Path(config.dir) / "rejects.jsonl").read_text().splitlines())
    assert (reject["line"], reject["reason"][: len(reason)]) == (4, reason)
    code = reason.replace("messages[1]: ", "").partition(":")[0].partition("[")[0]
    assert verify(Path(config.dir)).sources["p"].skipped == {code: 1}
    strict = replace(config, dir=str(tmp_path / "strict"), on_bad_row="error")
    with pytest.raises(DataError, match=r"p\.jsonl: the row at \d+ is bad"):
        prepare(strict, VOCAB_SIZE, SEED)


def test_fields_that_verifiers_need(data_config: DataConfig, tmp_path: Path) -> None:
    rows = [{"problem": "a", "tests": ["x"]}, {"problem": "b", "tests": None}, {"problem": "c", "key": 1}]
    given = {"text_key": "problem", "dir": str(tmp_path / "some"), "required_fields": ["tests"]}
    config = prepared_with(data_config, tmp_path / "p.jsonl", rows, **given)
    assert [of.fields for of in of_source(config, "p")] == rows[:1]
    config = prepared_with(
        data_config,
        tmp_path / "p.jsonl",
        rows,
        **given | {"dir": str(tmp_path / "all"), "required_fields": []},
    )
    assert [of.fields for of in of_source(config, "p")] == rows
    other = replace(config, sources={"p": replace(config.sources["p"], required_fields=["tests"])})
    law = r"data\.sources\.p\.required_fields: prepared with \[\], now \['tests'\]"
    with pytest.raises(DataError, match=law):
        Prompts(other, seed=SEED)


def test_prompts_of_exactly_the_limit_are_kept(
    config: DataConfig, questions: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    lengths = {
        json.dumps(of.fields): len(of.ids)
        for split in ("train", "validation")
        for of in of_source(config, "forms", split)
    }
    limit = sorted(lengths.values())[120]
    limited = replace(config, dir=str(tmp_path / "limited"), max_chat_tokens=limit)
    limited = replace(limited, tokenizer=config.dir, tokenizer_vocab_size=None)
    skipped = prepare(limited, VOCAB_SIZE, SEED).sources["forms"].skipped
    kept = {
        json.dumps(of.fields)
        for split in ("train", "validation")
        for of in of_source(limited, "forms", split)
    }
    assert kept == {fields for fields, length in lengths.items() if length <= limit}
    assert skipped == {"too_long": sum(length > limit for length in lengths.values())}


def test_of_equal_prompts_the_first_is_kept(data_config: DataConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n % 20}", "answer": n} for n in range(60)]
    rows += [
        {"prompt": "q0", "answer": 60, "enable_thinking": False},
        {"messages": [said("user", "q1")], "answer": 61},
    ]
    config = prepared_with(data_config, tmp_path / "p.jsonl", rows, slice_bytes=100)
    assert [of.fields["answer"] for of in of_source(config, "p")] == [*range(20), 60]
    assert verify(Path(config.dir)).sources["p"].skipped == {"duplicate": 41}
    every = replace(config, dir=str(tmp_path / "every"), deduplicate="none", validation_fraction=0.5)
    prepare(every, VOCAB_SIZE, SEED)
    train, validation = (
        {tuple(of.ids) for of in of_source(every, "p", split)} for split in ("train", "validation")
    )
    assert len(train | validation) == 21
    assert not train & validation, "equal prompts with different answers are in the same split"
    assert min(len(train), len(validation)) > 3


def test_workers_and_an_interruption_do_not_change_a_byte(unprepared: DataConfig, tmp_path: Path) -> None:
    other = replace(unprepared, dir=str(tmp_path / "other"), num_workers=3)
    prepare(unprepared, VOCAB_SIZE, SEED)
    prepare(other, VOCAB_SIZE, SEED)
    whole, folder = contents(unprepared.dir), Path(unprepared.dir)
    assert len(list(folder.glob("slices/forms-*/*.fields"))) > 5
    assert contents(other.dir) == whole
    (folder / "manifest.json").rename(folder / "plan.json")
    for path in folder.glob("slices/*-00001"):
        shutil.rmtree(path)
    prepare(unprepared, VOCAB_SIZE, SEED)
    assert contents(folder) == whole


@pytest.mark.parametrize("suffix", ["tokens", "offsets", "rows", "fields", "field_offsets", "loss"])
def test_a_flipped_bit_is_found(config: DataConfig, tmp_path: Path, suffix: str) -> None:
    folder = Path(shutil.copytree(config.dir, tmp_path / "copy"))
    shard = Manifest.load(folder).sources["forms"].shards["train"][1]
    path, _ = shard_file(folder, shard, suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    damaged = replace(config, dir=str(folder))
    with pytest.raises(DataError, match=rf"{path} is damaged between bytes 0 and {len(content)}: crc32 "):
        verify(folder)

    def read_all() -> None:
        with Prompts(damaged, seed=SEED, source="forms") as prompts:
            numbers = range(len(prompts))
            [prompts.origin(number) if suffix == "rows" else prompts[number] for number in numbers]

    if suffix == "loss":  # nobody reads it, but opening may: it checks some blocks, which are drawn
        with suppress(DataError):
            read_all()
    else:
        with pytest.raises(DataError, match=rf"{path} is damaged"):
            read_all()
    path.write_bytes(content[:-1])
    for find in (verify, lambda _: of_source(damaged, "forms")):
        with pytest.raises(DataError, match=rf"{path} has {len(content) - 1} bytes, its manifest says"):
            find(folder)


def test_a_folder_of_an_earlier_version_is_read(prepared: DataConfig, tmp_path: Path) -> None:
    """Its manifest does not say how long the fields are."""
    folder = Path(shutil.copytree(prepared.dir, tmp_path / "copy"))
    known, path = Manifest.load(folder), folder / "manifest.json"
    text = path.read_text().replace('"field_bytes": 0,', "")
    path.write_text(json.dumps({key: value for key, value in json.loads(text).items() if key != "crc32"}))
    assert "field_bytes" not in path.read_text()
    assert verify(folder) == known
    Manifest.load(folder).check_settings(prepared.content_settings(), folder)


def slow_order(config: DataConfig, total: int) -> list[tuple[int, str, dict[str, Any]]]:
    """Number, source and fields of the prompts of a run: all numbers are tried, skipped ones passed over."""
    of = {name: of_source(config, name) for name in ("forms", "sums")}
    sources = {
        name: MixtureSource(config.sources[name].weight, len(prompts), config.sources[name].max_epochs, 1.0)
        for name, prompts in of.items()
    }
    mixture = Mixture(sources, SEED, config.weight_changes)
    skipped = {row for first, end in config.skip for row in range(first, end)}
    rows = itertools.islice((row for row in itertools.count() if row not in skipped), total)
    places = [(row, mixture.locate(row)) for row in rows]
    return [(row, place.source, of[place.source][place.row].fields) for row, place in places]


@pytest.mark.parametrize("stop", [0, 1, 250, 999])
def test_the_order_is_that_of_the_mixture_from_any_number_on(config: DataConfig, stop: int) -> None:
    changed = replace(config, skip=[[5, 9], [31, 32], [100, 148]], weight_changes={300: {"sums": 0.5}})
    expected = slow_order(changed, 1000)
    with Prompts(changed, seed=SEED) as before:
        first = [before[number] for number in range(stop)]
    with Prompts(changed, seed=SEED) as prompts:  # in any order
        rest = [prompts[number] for number in reversed(range(stop, 1000))][::-1]
    assert [(of.row, of.source, of.fields) for of in first + rest] == expected


def test_weights_are_shares_of_prompts_and_an_epoch_has_each_prompt_once(config: DataConfig) -> None:
    with Prompts(config, seed=SEED) as prompts:
        assert prompts.describe() == [
            f"{name}: {len(of_source(config, name))} prompts" for name in ("forms", "sums")
        ]
        rows = [prompts[number] for number in range(800)]
        counts = Counter(of.source for of in rows)
        assert abs(counts["sums"] - 600) <= 2, "the prompts of sums are shorter: tokens must not count"
        epoch = len(of_source(config, "sums"))
        of_sums = [of.fields["answer"] for of in rows if of.source == "sums"]
        one, two = of_sums[:epoch], of_sums[epoch : 2 * epoch]
        assert sorted(one) == sorted(two) == sorted(of.fields["answer"] for of in of_source(config, "sums"))
        assert one != two
        sizes = {name: len(of_source(config, name)) for name in counts}
        expected = {name: {"prompts": n, "epochs": n / sizes[name]} for name, n in counts.items()}
        assert (prompts.seen(0), prompts.seen(800)) == ({}, expected)
    with Prompts(config, seed=SEED + 1) as prompts:
        assert [prompts[number].fields for number in range(800)] != [of.fields for of in rows]
    with Prompts(config, seed=SEED, source="sums") as prompts:
        assert (prompts.seen(9), prompts.check_budget(10**9)) == ({}, None)


def test_prompts_that_are_skipped_are_counted_as_seen(config: DataConfig) -> None:
    skipping = replace(config, skip=[[0, 100]])
    with Prompts(config, seed=SEED) as every, Prompts(skipping, seed=SEED) as some:
        assert some.seen(50) == every.seen(150)
        assert some[0] == every[100]


def test_budget(config: DataConfig) -> None:
    limited = replace(
        config, sources=config.sources | {"sums": replace(config.sources["sums"], max_epochs=1.0)}
    )
    sums = len(of_source(config, "sums"))
    for skip in ([], [[3, 40]]):
        with Prompts(replace(limited, skip=skip), seed=SEED) as prompts:
            found = []
            with pytest.raises(DataError, match=r"data\.sources\.sums\.max_epochs=1\.0 allows"):
                found.extend(prompts[number] for number in range(2000))
            prompts.check_budget(len(found))
            with pytest.raises(DataError, match=rf"allows {sums} rows \({sums} in an epoch\)"):
                prompts.check_budget(len(found) + 1)


def test_one_source_ends(config: DataConfig) -> None:
    with Prompts(replace(config, skip=[[0, 3]]), seed=SEED, source="sums", split="validation") as prompts:
        assert prompts[0].row == 0, "what is skipped is counted in the run, not in a source"
        for number in (-1, len(prompts)):
            with pytest.raises(IndexError):
                prompts[number]


def weighted(config: DataConfig, **weights: float) -> DataConfig:
    sources = {name: replace(of, weight=weights.get(name, 0.0)) for name, of in config.sources.items()}
    return replace(config, sources=sources)


def test_text_and_prompts_are_not_mixed(config: DataConfig) -> None:
    shape = {"seq_len": 32, "global_batch_size": 1, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    text = r"data\.sources\.letters\.kind=jsonl cannot be read by a stage that samples from prompts; set its"
    forms = (
        r"data\.sources\.forms\.kind=prompts cannot be read by a stage that trains on text; set its weight"
    )
    mixed = weighted(config, letters=1.0, forms=1.0)
    later = replace(weighted(config, forms=1.0), weight_changes={9: {"letters": 1.0}})
    for broken, source in ((mixed, None), (later, None), (config, "letters")):
        with pytest.raises(DataError, match=text):
            Prompts(broken, seed=SEED, source=source)
    for broken, source in ((mixed, None), (config, None), (config, "forms")):
        with pytest.raises(DataError, match=forms):
            Loader(broken, seed=SEED, source=source, **shape)
    assert len(mixed.reading_problems(as_prompts=True)) == len(mixed.reading_problems(as_prompts=False)) == 1
    assert config.reading_problems(as_prompts=True) == []
    assert weighted(config, letters=1.0).reading_problems(as_prompts=False) == []
    Loader(weighted(config, letters=1.0), seed=SEED, **shape).close()
    lengths = replace(config, packing="best_fit", length_shares={1: 1.0})
    [law] = lengths.reading_problems(as_prompts=True)
    assert law.startswith("data.length_shares={1: 1.0} has no use with prompts")


def test_no_rows_are_packed_of_prompts(config: DataConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(config.dir, tmp_path / "copy")
    make_plans(replace(weighted(config, letters=1.0), dir=str(folder), packing="best_fit"), 64)
    plans = sorted(path.name for path in (Path(folder) / "packing").glob("*.npz"))
    assert plans == ["letters-train-64.npz", "letters-validation-64.npz"]
    make_plans(replace(config, dir=str(folder), packing="best_fit"), 32)
    assert not (Path(folder) / "packing/letters-train-32.npz").exists()


def test_a_source_needs_a_prompt_of_the_right_type(data_config: DataConfig, tmp_path: Path) -> None:
    law = (
        r"data\.sources\.p: no form of conversations fits; .* its columns are prompt: int, answer: int; name"
    )
    with pytest.raises(DataError, match=law):
        prepared_with(data_config, tmp_path / "p.jsonl", [{"prompt": 1, "answer": 1}])
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"question": ["q"], "answer": [1]}), path)
    config = replace(
        data_config, sources={"p": SourceConfig("prompts", [str(path)])}, dir=str(tmp_path / "d")
    )
    with pytest.raises(DataError, match=r"p\.parquet: no form .* its columns are question: string, ans"):
        prepare(config, VOCAB_SIZE, SEED)


def test_the_embedded_prompts(data_config: DataConfig) -> None:
    sources = {"p": SourceConfig("prompts", ["task_prompts"])}
    config = replace(data_config, sources=sources, slice_bytes=10**6, shard_bytes=10**6)
    prepare(config, VOCAB_SIZE, SEED)
    found = [of.fields for split in ("train", "validation") for of in of_source(config, "p", split)]
    rows = [json.loads(text) for text in samples.documents("task_prompts")]
    assert sorted(found, key=str) == sorted(rows, key=str)


def test_tables_of_conversations(data_config: DataConfig, tmp_path: Path) -> None:
    rows = [{"messages": [said("system", "s"), said("user", f"q{n}")], "answer": n / 3} for n in range(5)]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    source = SourceConfig("prompts", [str(path)])
    config = replace(data_config, sources={"p": source}, validation_fraction=0.0)
    prepare(config, VOCAB_SIZE, SEED)
    found, tokenizer = of_source(config, "p"), load_tokenizer(config.dir)
    assert [of.fields for of in found] == rows
    assert [of.ids for of in found] == [encode(prompt(row, None), tokenizer)[0].tolist() for row in rows]


def test_numbers_of_prompts_count_with_alpha(config: DataConfig) -> None:
    even = {name: replace(of, weight=float(of.kind == "prompts")) for name, of in config.sources.items()}
    equally_often = replace(config, skip=[], sources=even, weights=WeightsConfig(alpha=1.0))
    with Prompts(equally_often, seed=SEED) as prompts:
        epochs = [of["epochs"] for of in prompts.seen(BLOCK_ROWS).values()]
    assert len(epochs) == 2
    assert epochs[0] == pytest.approx(epochs[1], rel=0.01)
