"""Every broken law of the data configuration is reported, with its key."""

from dataclasses import replace

import pytest

from data_pipeline.config import BLOCK_ROWS, DataConfig, SourceConfig, WeightsConfig

GOOD = SourceConfig(kind="text", paths=["a.txt"], text_key=None, weight=1.0, max_epochs=None)


def with_source(config: DataConfig, name: str = "a", **changes: object) -> DataConfig:
    return replace(config, sources={name: replace(GOOD, **changes), "other": GOOD})


def test_good_configuration(data_config: DataConfig) -> None:
    assert data_config.problems() == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dir": ""}, "data.dir"),
        ({"tokenizer_vocab_size": None}, "data.tokenizer is null"),
        ({"tokenizer_vocab_size": 100}, "data.tokenizer_vocab_size=100"),
        ({"tokenizer": "some/folder"}, "data.tokenizer_vocab_size=512"),
        ({"validation_fraction": 1.0}, "data.validation_fraction=1.0"),
        ({"slice_bytes": 0}, "data.slice_bytes=0"),
        ({"shard_bytes": 3}, "data.shard_bytes=3"),
        ({"num_workers": 0}, "data.num_workers=0"),
        ({"sources": {}}, "data.sources is empty"),
        ({"sources": {"a": replace(GOOD, weight=0.0)}}, "data.sources: the weights sum to 0"),
    ],
)
def test_broken_laws(data_config: DataConfig, changes: dict, key: str) -> None:
    problems = replace(data_config, **changes).problems()
    assert [problem for problem in problems if problem.startswith(key)], problems
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "a/b"}, "data.sources.a/b"),
        ({"kind": "csv"}, "data.sources.a.kind=csv"),
        ({"paths": []}, "data.sources.a.paths"),
        ({"kind": "jsonl", "text_key": ""}, "data.sources.a.text_key is empty"),
        ({"text_key": "text"}, "data.sources.a.text_key=text"),
        ({"kind": "prompts", "text_key": ""}, "data.sources.a.text_key is empty"),
        ({"required_fields": ["answer"]}, "data.sources.a.required_fields has no use with kind=text"),
        ({"weight": -0.5}, "data.sources.a.weight=-0.5"),
        ({"weight": float("inf")}, "data.sources.a.weight=inf"),
        ({"weight": 0.5 / BLOCK_ROWS}, "data.sources.a.weight="),
        ({"max_epochs": 0.0}, "data.sources.a.max_epochs=0.0"),
        ({"max_epochs": float("inf")}, "data.sources.a.max_epochs=inf"),
        ({"max_epochs": float("nan")}, "data.sources.a.max_epochs=nan"),
    ],
)
def test_broken_laws_of_a_source(data_config: DataConfig, changes: dict, key: str) -> None:
    problems = with_source(data_config, **changes).problems()
    assert [problem for problem in problems if problem.startswith(key)], problems


def test_a_source_needs_only_its_kind_and_paths(data_config: DataConfig) -> None:
    columns = {"jsonl": "text", "parquet": "text", "hub": "text", "text": None, "tree": None, "sft": None}
    sources = {kind: SourceConfig(kind=kind, paths=["a"]) for kind in columns}
    config = replace(data_config, sources=sources)
    assert config.problems() == []
    assert {kind: source.text_column for kind, source in sources.items()} == columns
    explicit = {kind: replace(source, text_key=columns[kind]) for kind, source in sources.items()}
    settings = replace(config, sources=explicit).content_settings()
    assert config.content_settings() == settings, (
        "what is prepared does not change when a default is written down"
    )


def test_what_prompts_need_is_part_of_what_is_prepared(data_config: DataConfig) -> None:
    def required(**changes: object) -> object:
        settings = with_source(data_config, kind="prompts", **changes).content_settings()
        assert "data.sources.other.required_fields" not in settings, "folders of earlier versions stay valid"
        return settings["data.sources.a.required_fields"]

    assert required() == required(required_fields=["answer"]) == ["answer"]
    assert required(required_fields=[]) == []
    assert with_source(data_config, kind="prompts", text_key="question").problems() == []
    assert with_source(data_config, kind="prompts").text_sources() == ["other"]


def test_all_broken_laws_are_reported_at_once(data_config: DataConfig) -> None:
    broken = replace(with_source(data_config, kind="csv", paths=[]), num_workers=0)
    assert len(broken.problems()) == 3


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"packing": "best"}, "data.packing=best"),
        ({"length_shares": {4: 1.0}}, "data.length_shares={4: 1.0} needs data.packing=best_fit"),
        ({"length_shares": {4: 0.5}, "packing": "best_fit"}, "data.length_shares={4: 0.5}: the shares sum"),
        ({"length_shares": {0: 1.0}, "packing": "best_fit"}, "data.length_shares={0: 1.0}: lengths"),
        ({"fim_rates": {"nobody": 0.5}}, "data.fim_rates.nobody is not a source"),
        ({"fim_rates": {"letters": 1.5}}, "data.fim_rates.letters=1.5"),
        ({"fim_rates": {"asked": 0.5}}, "data.fim_rates.asked is not a source of text"),
        ({"fim_spm_share": -0.1}, "data.fim_spm_share=-0.1"),
        ({"think_flag_share": 2.0}, "data.think_flag_share=2.0"),
        ({"weight_changes": {0: {"letters": 1.0}}}, "data.weight_changes.0:"),
        ({"weight_changes": {9: {"nobody": 1.0}}}, "data.weight_changes.9.nobody is not a source"),
        ({"weight_changes": {9: {"letters": 0.0, "numbers": 0.0}}}, "data.weight_changes.9="),
        ({"weights": WeightsConfig(alpha=1.5)}, "data.weights.alpha=1.5 must be in [0, 1]"),
        (
            {"weights": WeightsConfig(alpha=0.5), "length_shares": {4: 1.0}, "packing": "best_fit"},
            "data.weights.alpha has no use with data.length_shares",
        ),
        ({"skip": [[5, 5]]}, "data.skip: [5, 5]"),
        ({"skip": [[5, 9], [8, 10]]}, "data.skip: [8, 10]"),
    ],
)
def test_broken_laws_of_the_order(data_config: DataConfig, changes: dict, key: str) -> None:
    sources = {**data_config.sources, "asked": SourceConfig("prompts", ["a.jsonl"], weight=0.0)}
    [problem] = replace(data_config, sources=sources, **changes).problems()
    assert problem.startswith(key)


def test_sources_that_are_trained_on(data_config: DataConfig) -> None:
    idle = {name: replace(source, weight=0.0) for name, source in data_config.sources.items()}
    changed = replace(data_config, sources={**data_config.sources, "letters": idle["letters"]})
    assert changed.trained_sources() == {"numbers"}
    later = replace(changed, weight_changes={9: {"letters": 1.0, "numbers": 0.0}})
    assert later.trained_sources() == {"letters", "numbers"}
