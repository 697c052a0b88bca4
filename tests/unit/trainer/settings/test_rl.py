"""The laws of reinforcement learning's keys."""

import pytest

from trainer.settings.rl import OPTIONS, VerifierConfig, verifier_problems


def one(kind: str, **options: object) -> list[str]:
    return verifier_problems({"v": VerifierConfig(kind, 1.0, options=options or None)})


def test_verifiers_that_keep_the_laws(tmp_path, monkeypatch):
    (tmp_path / "good_verifiers.py").write_text("def judge(fields, completion, options): return 1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [one(kind) for kind in OPTIONS if kind != "regex"] == [[]] * (len(OPTIONS) - 1)
    assert one("regex", pattern="a+", match="search") == one("regex", pattern_key="shape") == []
    assert one("number", tolerance=1) == one("code", partial=True, memory_mb=64) == []
    assert one("good_verifiers:judge", anything=[1]) == []


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        (
            "exakt",
            {},
            "rl.verifiers.v.kind=exakt is unknown (did you mean exact?); use exact, number, math, ",
        ),
        ("", {}, "rl.verifiers.v.kind= is unknown; use "),
        (
            "exact",
            {"anwser_key": "a"},
            ".options.anwser_key is unknown (did you mean answer_key?); options of",
        ),
        ("math", {"ignore_case": True}, ".options.ignore_case is unknown; options of math: answer_key"),
        ("exact", {"ignore_case": 1}, ".options.ignore_case=1 must be of type bool"),
        ("exact", {"answer_key": None}, ".options.answer_key=None must be of type str"),
        ("number", {"tolerance": True}, ".options.tolerance=True must be of type float"),
        ("number", {"tolerance": -0.1}, ".options.tolerance=-0.1 is below 0; use 0 or more"),
        ("code", {"memory_mb": 1.5}, ".options.memory_mb=1.5 must be of type int"),
        ("code", {"memory_mb": 63}, ".options.memory_mb=63 is below 64; use 64 or more"),
        ("regex", {}, ".options must hold either pattern, or pattern_key"),
        ("regex", {"pattern": "a", "pattern_key": "b"}, ".options must hold either pattern, or pattern_key"),
        ("regex", {"pattern": "(a"}, ".options.pattern=(a is no regular expression (missing ), unterminated"),
        ("regex", {"pattern": "a", "match": "find"}, ".options.match=find is unknown; use fullmatch, search"),
        (
            "format",
            {"think": "always"},
            ".options.think=always is unknown; use required, forbidden, optional",
        ),
        ("format", {"pattern": "*"}, ".options.pattern=* is no regular expression (nothing to repeat"),
        (
            "no_such_module:f",
            {},
            "kind=no_such_module:f: no_such_module cannot be imported (ModuleNotFoundError",
        ),
        (":f", {}, "kind=:f:  cannot be imported (ValueError: Empty module name)"),
        (
            "bad_verifiers:f",
            {},
            "bad_verifiers cannot be imported (SystemExit: 3); mend it, or put its folder on",
        ),
        ("json:lods", {}, "kind=json:lods: json has no function lods; define it there"),
        ("json:decoder", {}, "kind=json:decoder: json has no function decoder; define it there"),
        ("json:", {}, "kind=json:: json has no function ; define it there"),
    ],
)
def test_a_broken_law_is_one_line(tmp_path, monkeypatch, kind, options, line):
    (tmp_path / "bad_verifiers.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    [problem] = one(kind, **options)
    assert line in problem
    assert problem.startswith("rl.verifiers.v.")
    assert "\n" not in problem


def test_all_broken_laws_are_told_at_once():
    assert verifier_problems({}) == [
        "rl.verifiers is empty; name at least one, as rl.verifiers.right={kind: exact, weight: 1}"
    ]
    several = {"a": VerifierConfig("exakt", 0.0), "b": VerifierConfig("format", 0.0, options={"think": 1})}
    problems = verifier_problems(several)
    assert len(problems) == 3
    assert problems[0].startswith("rl.verifiers: every weight is 0")
    assert problems[1].startswith("rl.verifiers.a.kind=")
    assert problems[2] == "rl.verifiers.b.options.think=1 must be of type str"
    several["a"].weight = 1.0
    assert len(verifier_problems(several)) == 2
