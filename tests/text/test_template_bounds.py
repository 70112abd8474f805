"""Chat templates of strangers: a sandbox that holds, and bounds on what they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.errors import InvalidRequestError
from headrace.text import template_bounds, template_sizes
from headrace.text.chat_template import ChatTemplate

USER = {"role": "user", "content": "How much water?"}


def render(source: str, *messages: dict[str, Any], **variables: Any) -> str:
    return ChatTemplate(source, Path("t.jinja")).render(list(messages), variables)


def refusal(source: str) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        render(source, USER)
    assert caught.value.field == "messages"
    return caught.value.message


# The sandbox


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ ('%s' | attr('format')).__globals__.os }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update(role='x') %}",
        "{% set _ = dict.update(messages[0], {'role': 'x'}) %}{{ messages[0].role }}",
        "{{ (messages | map(attribute='__class__') | first).__mro__ }}",
        "{{ messages | selectattr('__class__.__mro__') | list }}",
        "{{ messages | groupby('__class__.__name__') }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}{{ 1 // 0 }}",
        "{{ '%s'.format_map({}) }}",
        "{{ (5).to_bytes(10 ** 9, 'big') }}",
        "{{ 'a'.encode() }}",
        "{{ 'a'.translate({97: 'b'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ 1 // 0 }}",
        "{{ nothing.at.all }}",
        "{{ range(10 ** 7) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_cannot_break_out(source: str) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"the chat template 'default' of t\.jinja refuses"
    ) as caught:
        render(source, USER)
    assert caught.value.field == "messages"


def test_a_format_string_sees_no_internals() -> None:
    assert render("{{ '{0.__class__}'.format(1) }}{{ '{0}'.format(1) }}") == "1"


# Bounds


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(64) }}",
        "{% for i in [1] * 9 recursive %}{{ loop([1] * 9) }}{% endfor %}",
        "{% for i in range(99) %}{{ long | upper | length }}{% endfor %}",
        "{% for i in range(99) %}{{ long.count('b') }}{% endfor %}",
        "{% for i in range(99) %}{{ long[1:] | length }}{% endfor %}",
        "{% for i in range(99) %}{{ 'b' in long }}{% endfor %}",
        "{% for i in range(99) %}{{ long ~ i == long ~ i }}{% endfor %}",
        "{% for i in range(99) %}{{ [long] | select('equalto', long ~ i) | list }}{% endfor %}",
        "{% for i in range(99) %}{{ range(9999) | sum }}{% endfor %}",
        "{% for i in range(99) %}{{ range(9999) | list | length }}{% endfor %}",
        "{% for i in range(99) %}{% set x %}{{ long }}{% endset %}{% endfor %}",
        "{% set n = namespace(x=[]) %}{% for i in range(999) %}{% set n.x = n.x+[0] %}{% endfor %}",
    ],
)
def test_a_template_does_not_run_for_ever(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "MOST_STEPS", 10**6)
    message = refusal("{% set long = 'ab' * 10000 %}" + source)
    assert "it takes more than 1000000 steps" in message or "maximum recursion" in message


def test_work_within_the_bound_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "MOST_STEPS", 10**6)
    assert render("{% for i in range(150) %}{{ 'ab' | upper }}{% endfor %}") == "AB" * 150


GROWING = (
    "{% set n = namespace(x=[1] * 99) %}{% for i in range(99) %}{% set n.x = MORE %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'a' }}",
        "{{ ([1] * 10 ** 9) | length }}",
        "{{ 'a' * 10 ** 7 ~ 'b' * 10 ** 8 }}",
        "{% set x = namespace(y='a') %}{% for i in [1] * 99 %}{% set x.y = x.y~x.y %}{% endfor %}",
        "{% set x = namespace(y='a') %}{% for i in [1] * 99 %}{% set x.y = x.y+x.y %}{% endfor %}",
        "{% for i in range(99) %}{{ 'a' * 10 ** 6 }}{% endfor %}",
        "{% set x %}{% for i in range(99) %}{{ 'a' * 10 ** 6 }}{% endfor %}{% endset %}{{ x }}",
        *(
            GROWING.replace("MORE", each)
            for each in (
                "n.x + n.x",
                "[n.x, n.x]",
                "(n.x, n.x)",
                "{'a': n.x, 'b': n.x}",
                "dict(a=n.x, b=n.x)",
                "[n.x] * 2",
                "[{'a': n.x}.values()] * 2",
                "([none] * 999) | map('default', n.x, true) | list",
                "[n.x, n.x] | sum(start=[])",
            )
        ),
        "{{ 'x'.center(10 ** 9) }}",
        "{{ 'x'.ljust(10 ** 9) }}{{ 'x'.rjust(10 ** 9) }}",
        "{{ 'x'.zfill(10 ** 9) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%.999999999f' % 1 }}",
        "{{ '%99999999999999999999d' % 1 }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ ('%s' * 10 ** 4) % (('a' * 10 ** 4,) * 10 ** 4) }}",
        "{{ ('{0}' * 10 ** 4).format('a' * 10 ** 4) }}",
        "{{ ('a' * 10 ** 4).replace('a', 'a' * 10 ** 4) }}",
        "{{ ('a' * 10 ** 4) | replace('a', 'a' * 10 ** 4) }}",
        "{{ ('a' * 10 ** 4).join('b' * 10 ** 4) }}",
        "{{ ('a' * 10 ** 4).join(range(10 ** 4) | map('string')) }}",
        "{{ range(10 ** 4) | join('a' * 10 ** 4) }}",
        "{{ ('a\\n' * 10 ** 4) | indent(10 ** 4) }}",
        "{{ ([1] * 10 ** 4) | tojson(indent=10 ** 4) }}",
        "{{ ('a ' * 10 ** 7).split() | length }}",
        "{{ ('a' * 10 ** 7).rsplit('a') | length }}",
        "{{ ('\\n' * 10 ** 7).splitlines() | length }}",
    ],
)
def test_a_template_does_not_fill_the_memory(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sizes, "MOST_CHARACTERS", 10**6)
    assert "it makes more than 1000000 characters" in refusal(source)


def test_the_bounds_leave_room() -> None:
    assert len(render("{{ 'a' * (10 ** 7) }}{% for i in range(9999) %}b{% endfor %}")) == 10009999
    assert "more than 67108864 characters" in refusal("{{ 'a' * 10 ** 8 }}")
    loop = "{% for i in range(999) %}{% set x = 'a' * 10 ** 7 %}{% endfor %}"
    assert "more than 1073741824 steps" in refusal(loop)


@pytest.mark.parametrize(
    "source", ["{{ '%*d' % (10 ** 9, 1) }}", "{{ '%-*d' % (9, 1) }}", "{{ '{:{}}'.format(1, 9) }}"]
)
def test_widths_must_stand_in_a_format(source: str) -> None:
    assert "a format whose width is not written in it" in refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 10 ** (10 ** 9) }}",
        "{{ (2 ** 4000 * 2 ** 4000) > 1 }}",
        "{% set x = namespace(y=3) %}{% for i in range(99) %}{% set x.y = x.y * x.y %}{% endfor %}",
    ],
)
def test_integers_stay_small(source: str) -> None:
    assert "an integer of more than 4096 bits" in refusal(source)


def test_nothing_large_is_made_of_constants_before_a_rendering() -> None:
    ChatTemplate("{{ 'x' | center(1000000000) }}{{ '%999999999d' % 1 }}", "t.jinja")


def test_a_namespace_may_hold_itself() -> None:
    source = "{% set n = namespace() %}{% set n.n = n %}{{ n }}{{ [n, n] | length }}"
    assert render(source) == "<namespace>2"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a' ~ 1 ~ none ~ x }}|{{ 'a' + 'b' }}|{{ [1] + [2] }}", "a1Noney|ab|[1, 2]"),
        ("{{ 'ab' * 2 }}|{{ 3 * 4 }}|{{ 2 ** 10 }}|{{ 2 ** -1 }}", "abab|12|1024|0.5"),
        ("{{ 0.5 * 3 }}|{{ 1 + 0.5 }}|{{ 'x' * -1 }}|{{ 7 % 4 }}", "1.5|1.5||3"),
        ("{{ '%s=%5.2f%%' % ('a', 0.5) }}|{{ '%d' % 123456789 }}", "a= 0.50%|123456789"),
        ("{{ '%s%%*' | format(3) }}|{{ '%(a)s' | format(a=1) }}", "3%*|1"),
        ("{{ '{}{x:>3}{{}}'.format(1, x='y') }}", "1  y{}"),
        ("{% for i in range(5) if i % 2 %}{{ loop.index }}{{ i }}{% else %}no{% endfor %}", "1123"),
        (
            "{% macro m(a, b=2) %}{{ b }}{{ caller() }}{% endmacro %}{% call m(1) %}c{% endcall %}",
            "2c",
        ),
        ("{% for a, b in {'x': 1} | items %}{{ a, b }}{% endfor %}", "('x', 1)"),
        ("{% set a, b = 1, [2, x] %}{{ a }}{{ b }}{{ {'k': x} }}", "1[2, 'y']{'k': 'y'}"),
        ("{{ 'a-b-c'.split('-', 1) }}{{ 'a b'.split() }}", "['a', 'b-c']['a', 'b']"),
        ("{% for i in [1] %}{{ 'a-b'.rsplit(sep='-') }}{% endfor %}", "['a', 'b']"),
        ("{{ ','.join(['a', x]) }}{{ [1, x] | join('+') }}", "a,y1+y"),
        ("{{ [{'n': 1}, {'n': 2}] | join('-', attribute='n') }}", "1-2"),
        ("{{ [{'n': 1}, {'n': 2}] | sum(attribute='n') }}{{ [] | sum }}", "30"),
        ("{{ 'aab'.replace('a', 'c', 1) }}{{ 'aab' | replace('a', 'cc', 1) }}", "cabccab"),
        ("{{ 'a\\nb' | indent(2) }}{{ 'ab'[1:] }}{{ 'ab'.ljust(3) }}.", "a\n  bbab ."),
        (
            "{{ 1 < 2 < 3 }}{{ x in ['y'] }}{{ 'z' not in x }}{{ x is in 'xyz' }}",
            "TrueTrueTrueTrue",
        ),
        ("{{ [1, 2, 3] | select('gt', 1) | map('string') | list }}", "['2', '3']"),
        ("{{ dict(a=1) }}{{ {'a': [1, {'b': x}]} | tojson(indent=1) | length }}", "{'a': 1}39"),
        ("{{ ['b', 'a'] | sort | first }}{{ 'abc' | list }}", "a['a', 'b', 'c']"),
    ],
)
def test_all_else_is_as_in_jinja(source: str, expected: str) -> None:
    assert render(source, x="y") == expected


def test_each_rendering_has_its_own_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "MOST_STEPS", 10**6)
    template = ChatTemplate("{% for i in range(200) %}{% endfor %}", Path("t.jinja"))
    for _ in range(3):
        assert template.render([USER], {}) == ""


def test_a_reason_is_short() -> None:
    assert len(refusal("{{ raise_exception('no' * 10 ** 6) }}")) < 1100


def test_there_is_no_text_to_fill_in() -> None:
    assert "'lipsum' is undefined" in refusal("{{ lipsum(10 ** 6) }}")
