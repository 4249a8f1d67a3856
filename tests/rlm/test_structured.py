"""Answers of a given form: lenient about spelling, strict about type, clear to the model, safe
against its schemas."""

import dataclasses
import datetime
import enum
import json
import sys
import time
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_validator
from typing_extensions import TypedDict

from rlm_runtime.errors import UsageError
from rlm_runtime.replies import model_json
from rlm_runtime.replies.thinking import clean
from rlm_runtime.structured import Shape


class Person(BaseModel):
    name: str
    age: int = Field(ge=0)
    tags: list[str] = []

    @field_validator("name")
    @classmethod
    def no_blank(cls, value):
        if not value.strip():
            raise ValueError("the name is blank")
        return value


class Team(BaseModel):
    lead: Person
    members: dict[str, Person] = {}


@dataclasses.dataclass
class Point:
    x: float
    y: float


class Movie(TypedDict):
    title: str
    year: int


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


PERSON_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def parse_json_reply(text):
    """The JSON value in a reply, in a tuple of one; None where there is none."""
    return model_json.in_reply(clean(text).text)


def good(form, value):
    found, problem = Shape.of(form).check(value)
    assert problem is None, problem
    return found


def bad(form, value):
    found, problem = Shape.of(form).check(value)
    assert found is None and problem
    return problem


# -- forms
@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (str, "a", "a"),
        (bool, False, False),
        (list[str], ["a"], ["a"]),
        (dict[str, int], {"a": 1}, {"a": 1}),
        (tuple[int, str], [1, "a"], (1, "a")),
        (int | None, None, None),
        (typing.Literal["a", "b"], "b", "b"),
        (Point, {"x": 1, "y": 2.5}, Point(1.0, 2.5)),
        (Movie, {"title": "M", "year": 1931}, {"title": "M", "year": 1931}),
        (Person, {"name": "Ada", "age": 36}, Person(name="Ada", age=36)),
        (datetime.date, "2023-01-06", datetime.date(2023, 1, 6)),
        (Colour, "red", Colour.RED),
        (PERSON_SCHEMA, {"name": "Ada", "age": 36}, {"name": "Ada", "age": 36}),
        ({"enum": ["a", 1, None]}, None, None),
        ({}, {"any": ["thing"]}, {"any": ["thing"]}),
    ],
)
def test_a_fitting_value_is_taken(form, value, expected):
    found = good(form, value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("form", [Person, PERSON_SCHEMA])
def test_the_schema_is_a_json_schema_of_the_form(form):
    schema = Shape.of(form).schema
    assert schema["type"] == "object" and set(schema["properties"]) == {"name", "age", "tags"}
    assert json.loads(json.dumps(schema)) == schema
    again = Shape.of(schema)
    assert (
        again.check({"name": "Ada", "age": 3})[1] is None
        and again.check({"name": "Ada"})[1] is not None
    )


def test_schemas_as_endpoints_wrap_them():
    wrapped = {
        "type": "json_schema",
        "json_schema": {"name": "p", "strict": True, "schema": PERSON_SCHEMA},
    }
    assert Shape.of(wrapped).schema == PERSON_SCHEMA
    assert Shape.of({"name": "p", "schema": PERSON_SCHEMA}).schema == PERSON_SCHEMA


@pytest.mark.parametrize(
    ("form", "word"),
    [
        (5, "5"),
        (None, "null"),
        ("int", '"int"'),
        ([int], "expected a type"),
        (object(), "no type"),
        (print, "expected a type"),
        (lambda x: x, "expected a type"),
        ({"type": "strin"}, "strin"),
        ({"properties": {"a": {"type": 3}}}, "properties.a.type"),
        ({"field": "int"}, "no JSON schema keyword"),
        ({"$ref": "#/$defs/none"}, "#/$defs/none"),
        ({"$ref": "#"}, "leads back"),
        ({"allOf": [{"$ref": "#"}]}, "leads back"),
        ({"$ref": "http://example.org/x"}, "http://example.org/x"),
        ({"type": "string", "pattern": "(?=a)"}, "(?=a)"),
        ({"type": "string", "pattern": "("}, "pattern"),
        ({"type": "object", "patternProperties": {"a": {}}}, "patternProperties"),
        ({"type": "object", "default": object()}, "JSON values only"),
        ({"enum": ["x" * 200_000]}, "characters"),
    ],
)
def test_what_is_no_form_is_refused_at_once(form, word):
    with pytest.raises(UsageError) as caught:
        Shape.of(form)
    assert word in str(caught.value)


def test_a_schema_nested_out_of_bounds_is_refused():
    schema = {"type": "object"}
    for _ in range(3000):
        schema = {"properties": {"a": schema}}
    with pytest.raises(UsageError):
        Shape.of(schema)


# -- leniency
@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (int, "42", 42),
        (int, "1,234,567", 1234567),
        (int, "-3", -3),
        (int, "**42**", 42),
        (int, "The answer is 42.", 42),
        (int, "3.0", 3),
        (float, "2.5e3", 2500.0),
        (bool, "Yes", True),
        (bool, "false", False),
        (int | None, "null", None),
        (list[int], "[1, 2]", [1, 2]),
        (list[int], ["1", 2], [1, 2]),
        (list[str], "['a', 'b']", ["a", "b"]),
        (list[str], 'So:\n```json\n["a"]\n```\nDone.', ["a"]),
        (Colour, "'red'", Colour.RED),
        (Person, '{"name": "Ada", "age": "36"}', Person(name="Ada", age=36)),
        (Team, {"lead": {"name": "Ada", "age": "36"}}, Team(lead=Person(name="Ada", age=36))),
        (Team, {"lead": '{"name": "Ada", "age": 36}'}, Team(lead=Person(name="Ada", age=36))),
        (
            PERSON_SCHEMA,
            {"name": "7", "age": "7", "tags": ["8"]},
            {"name": "7", "age": 7, "tags": ["8"]},
        ),
    ],
)
def test_other_spellings_of_a_value_are_taken(form, value, expected):
    found = good(form, value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        (str, "42"),
        (str, "true"),
        (str, '{"a": 1}'),
        (int | str, "42"),
        ({"type": ["string", "integer"]}, "42"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "42"),
        ({"enum": ["1", 1]}, "1"),
    ],
)
def test_a_text_stays_a_text_where_one_may_stand(form, value):
    assert good(form, value) == value


@pytest.mark.parametrize(
    ("form", "value"),
    [
        (int, 3.5),
        (int, True),
        (int, "3.5"),
        (int, "about 42"),
        (int, "4 or 2"),
        (bool, 1),
        (bool, "maybe"),
        (str, 42),
        (str, None),
        (list[int], [1, "x"]),
        (list[str], "a, b"),
        (Person, []),
        (float, float("nan")),
        (int, {1, 2}),
        (Movie, {"title": "M"}),
        (Colour, "green"),
        (PERSON_SCHEMA, {"name": "a", "age": 1.5}),
    ],
)
def test_a_value_of_another_type_is_not_bent_into_shape(form, value):
    bad(form, value)


# -- what the model is told
@pytest.mark.parametrize("form", [Person, PERSON_SCHEMA])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"name": "Ada"}, ["`age`", "missing"]),
        ({"name": "Ada", "age": "old"}, ["`age`", "integer", '"old"']),
        ({"name": 3, "age": 3}, ["`name`", "string", "3"]),
        ({"name": "Ada", "age": 3, "tags": ["a", 5]}, ["`tags[1]`", "5"]),
        ("no object at all", ["object", "no object at all"]),
    ],
)
def test_problems_name_the_field(form, value, words):
    problem = bad(form, value)
    assert all(word in problem for word in words), problem


def test_problems_of_own_validators_and_deep_fields():
    assert "the name is blank" in bad(Person, {"name": " ", "age": 1})
    assert "`members.x.age`" in bad(
        Team, {"lead": {"name": "a", "age": 1}, "members": {"x": {"name": "b"}}}
    )


def test_problems_stay_short_however_wrong_the_value():
    assert len(bad(list[int], ["x" * 10_000] * 1000)) < 1500
    assert len(bad({"type": "array", "items": {"type": "integer"}}, ["x" * 10_000] * 1000)) < 1500
    assert "more" in bad(list[int], ["x"] * 50)


def test_a_complaint_holds_the_problem_and_the_schema():
    text = Shape.of(Person).complaint("`age` is missing")
    assert "`age` is missing" in text and '"age"' in text


# -- JSON among words
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("null", None),
        ('{"a": 1}', {"a": 1}),
        ('Here it is: {"a": [1, 2]} as asked.', {"a": [1, 2]}),
        ('First [1], then {"a": {"b": 2}}.', {"a": {"b": 2}}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('```\n{"a": 1}', {"a": 1}),
        ('Not {"x": "long long long"} but\n```json\n{"a": 1}\n```\nso.', {"a": 1}),
        ('<think>{"a": 0}</think>{"a": 1}', {"a": 1}),
        ('maybe {"a": 0}\n</think>\n{"a": 1}', {"a": 1}),
        ("{'a': True, 'b': None}", {"a": True, "b": None}),
        ('{"a": [1, 2,],}', {"a": [1, 2]}),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
        ("{“a”: 1}", {"a": 1}),
        ('{"a": "</think>"}', {"a": "</think>"}),
    ],
)
def test_json_is_found_in_a_chatty_reply(text, value):
    assert parse_json_reply(text) == (value,)


@pytest.mark.parametrize("text", ["", "no JSON", "{", "{a: b", "[1, 2", '{"a": NaN}'])
def test_where_there_is_no_json_none_is_found(text):
    assert parse_json_reply(text) is None


def test_a_reply_that_is_a_json_string_is_the_string():
    assert Shape.of(str).parse('"Paris"') == ("Paris", None)
    assert Shape.of(str).parse("Paris") == ("Paris", None)
    assert Shape.of(str).check('"Paris"') == ('"Paris"', None)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_any_json_value_survives_its_own_text(value):
    assert parse_json_reply(json.dumps(value)) == (value,)
    if isinstance(value, dict | list) and value:
        assert parse_json_reply(f"So it is:\n```json\n{json.dumps(value, indent=1)}\n```") == (
            value,
        )


@settings(max_examples=150, deadline=None)
@given(
    JSON | st.text(),
    st.sampled_from(
        [
            int,
            bool,
            str,
            list[int],
            Person,
            Team,
            PERSON_SCHEMA,
            {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        ]
    ),
)
def test_any_value_is_judged_without_an_exception(value, form):
    shape = Shape.of(form)
    for found, problem in (shape.check(value), shape.read(value), shape.parse(str(value))):
        assert problem is None or (
            found is None and isinstance(problem, str) and len(problem) < 2000
        )


# -- schemas and values come from cells and models: nothing they hold may stop the host
def test_hostile_schemas_and_values_take_bounded_time():
    began = time.perf_counter()
    assert "does not match" in bad({"type": "string", "pattern": "^(a+)+$"}, "a" * 50_000 + "!")
    doubling = {
        "type": "object",
        "properties": {"a": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, "b": {"type": "string"}},
    }
    value = {"b": 1}
    for _ in range(60):
        value = {"a": value}
    assert "too long" in bad(doubling, value)
    defs = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)} | {
        "d60": {"type": "string"}
    }
    assert "too long" in bad({"$ref": "#/$defs/d0", "$defs": defs}, "a")
    assert "twice" in bad(
        {"type": "array", "uniqueItems": True}, [{"a": i} for i in range(20_000)] + [{"a": 1}]
    )
    for text in (
        "[" * 1_000_000,
        "{" * 1_000_000,
        '{"a":' * 200_000,
        '[{"' * 300_000,
        "```json\n" * 100_000,
        "<think>" * 100_000,
    ):
        assert parse_json_reply(text) is None
    assert bad(list[int], "[" * 1_000_000)
    assert time.perf_counter() - began < 30


def test_a_deep_value_is_judged():
    value = 1
    for _ in range(sys.getrecursionlimit() * 3):
        value = [value]
    bad(int, value)
    bad(PERSON_SCHEMA, value)
    bad(PERSON_SCHEMA, {"name": value, "age": 1})


def test_large_arrays_pass():
    assert (
        len(good({"type": "array", "items": PERSON_SCHEMA}, [{"name": "Ada", "age": 3}] * 3000))
        == 3000
    )
