"""Chat templates in the sandbox: what they cannot reach, how much they may do, and what their errors name."""

import pytest

from data_pipeline import sandbox
from data_pipeline.config import DataError
from data_pipeline.sandbox import ENDS, STARTS, JinjaTemplate

ASKED = [{"role": "user", "content": "q"}]


def rendered(text: str, *, marked: bool = False, **options: object) -> str:
    return JinjaTemplate(text, "mine.jinja").render(ASKED, None, options, marked=marked)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{% extends 'base' %}", "no loader"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ messages[0].update(a=1) }}", "is unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "a namespace cannot hold '__class__'"),
        ("{{ namespace(__class__=1) }}", "a namespace cannot hold '__class__'"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ x.y.z }}", "'x' is undefined"),
        ("{{ 1 // 0 }}", "division"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
    ],
)
def test_what_a_template_cannot_do_is_an_error_with_its_line(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^template: mine.jinja:3: ") as error:
        rendered(f"{{#- first -#}}\n\n{text}")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ dict.mro }}",
        "{{ self.__init__ }}",
    ],
)
def test_internals_of_python_are_undefined(text: str) -> None:
    assert rendered(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for a in range(200) %}{% for b in range(200) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(14) }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(24) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{{ 'a' * 10 ** 7 }}",
        "{{ ([1] * 10 ** 7) | length }}",
        "{{ 2 ** 9999999 }}",
        "{{ 'a'.center(10 ** 7) | length }}",
        "{{ 'a' | center(10 ** 7) | length }}",
        "{{ 'a' | indent(10 ** 7) }}",
        "{{ '%9999999d' % 3 }}",
        "{{ '%9999999d' | format(3) }}",
        "{{ '{:>9999999}'.format('') }}",
        "{% for i in range(9) %}{{ 'abcdefghijk' }}{% endfor %}",
    ],
)
def test_endless_loops_and_huge_texts_end_with_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_TURNS", 2000)
    monkeypatch.setattr(sandbox, "MOST_CHARACTERS", 50 if "abcdefghijk" in text else 1 << 20)
    with pytest.raises(ValueError, match=r"template: mine.jinja:1: .*(more than|too large|too big)"):
        rendered(text)


def test_each_rendering_has_all_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_TURNS", 10)
    template = JinjaTemplate("{% for i in range(10) %}{{ i }}{% endfor %}", "mine.jinja")
    assert [template.render(ASKED, None, {}) for _ in range(3)] == 3 * ["0123456789"]


def test_large_numbers_in_messages_are_no_widths() -> None:
    text = "{% macro shown(value) %}{{ value }}{% endmacro %}{{ shown(number) }}{{ number + 1 }}"
    assert rendered(text, number=10**15) == f"{10**15}{10**15 + 1}"


@pytest.mark.parametrize("text", ["a\n{% if %}", "a\n{{ ( }}", "a\n{% for x in y %}", "a\n{% nothing %}"])
def test_a_text_that_is_no_template_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(DataError, match=r"mine.jinja:2: not a chat template \(.*\); correct it"):
        JinjaTemplate(text, "mine.jinja")


def test_generation_is_marked_where_marks_are_wanted() -> None:
    text = "a{% generation %}b{% endgeneration %}c"
    assert rendered(text) == "abc"
    assert rendered(text, marked=True) == f"a{STARTS}b{ENDS}c"
    assert JinjaTemplate(text, "x").marks_answers
    assert not JinjaTemplate("{% macro m() %}{% endmacro %}{% call m() %}{% endcall %}", "x").marks_answers
