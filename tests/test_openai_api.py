import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertmaster.core.errors import InvalidRequestError, ModelNotFoundError
from concertmaster.core.events import FailReason, RejectReason
from concertmaster.core.request import PREFIX_CHUNK_TOKENS
from concertmaster.gateway.openai_api import (
    BYTES_PER_TOKEN,
    MAX_PREFIX_CHUNKS,
    CallBody,
    caller_error,
    completion_tokens,
    error_body,
    parse_call,
    prefix_hashes,
    prompt_tokens,
    refusal,
    response,
    with_model,
)

CHUNK_BYTES = PREFIX_CHUNK_TOKENS * BYTES_PER_TOKEN
MESSAGES = [{"role": "user", "content": "hi"}]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
keys = st.text().filter(lambda key: key != "model")


def a_call(**fields: object) -> CallBody:
    return parse_call(
        json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode(), chat=True
    )


# Choosing the model.


@settings(max_examples=60)
@given(
    before=st.dictionaries(keys, values, max_size=4),
    after=st.dictionaries(keys, values, max_size=4),
    asked=st.sampled_from(["auto", "m", ["a", "b"], None]),
    model=st.text(),
    separators=st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]),
    ascii_only=st.booleans(),
)
def test_the_model_is_replaced_and_every_other_value_stays_byte_for_byte(
    before: dict[str, Any],
    after: dict[str, Any],
    asked: object,
    model: str,
    separators: tuple[str, str],
    *,
    ascii_only: bool,
) -> None:
    fields = {**before, "model": asked, **after}

    def written(value: object) -> bytes:
        text = json.dumps(value, separators=separators, ensure_ascii=ascii_only)
        return text.encode("utf-8", "surrogatepass")

    body = with_model(written(fields), model)

    assert list(json.loads(body).items()) == list({**fields, "model": model}.items())
    for key, value in fields.items():
        if key != "model":
            assert b":" + written(value) in body


def test_numbers_that_no_float_can_hold_stay_as_they_were() -> None:
    body = b'{"model":"auto","a":1e400,"b":1.0e+3,"c":123456789012345678901234567890,"d":-0.0}'

    assert with_model(body, "m") == body.replace(b'"auto"', b'"m"')


@pytest.mark.parametrize(
    ("asked", "models"),
    [
        ("m", ("m",)),
        ("auto", ()),
        (["a", "b"], ("a", "b")),
        (["a", "auto"], ()),
        (["a"], ("a",)),
    ],
)
def test_a_call_names_one_model_several_or_any(asked: object, models: tuple[str, ...]) -> None:
    assert a_call(model=asked).models() == models


@pytest.mark.parametrize("nothing", [None, "", []])
def test_a_call_must_name_a_model(nothing: object) -> None:
    with pytest.raises(InvalidRequestError) as refusal_:
        a_call(model=nothing).models()

    assert str(refusal_.value) == (
        'model: expected a model name, a list of names or "auto", found nothing'
    )
    assert refusal_.value.param == "model"


# Reading bodies.


MALFORMED = "body: expected a JSON object, found "


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b"", MALFORMED + "Input data was truncated", None),
        (b'{"model":', MALFORMED + "Input data was truncated", None),
        (b"hello", MALFORMED + "JSON is malformed: invalid character (byte 0)", None),
        (b'{"a":1} b', MALFORMED + "JSON is malformed: trailing characters (byte 9)", None),
        (b'{"x":NaN}', MALFORMED + "JSON is malformed: invalid character (byte 5)", None),
        (b'{"model":"\xff"}', "body: expected a JSON object in UTF-8", None),
        (b'{"x":' + b"[" * 100_000, "body: expected JSON of less depth", None),
        (b"[]", "body: expected object, got array", None),
        (b'"text"', "body: expected object, got str", None),
        (b'{"model":5}', "model: expected str | array | null, got int", "model"),
        (b'{"model":["a",5]}', "model[1]: expected str, got int", "model[1]"),
        (b'{"stream":"yes"}', "stream: expected bool | null, got str", "stream"),
        (b'{"max_tokens":1.5}', "max_tokens: expected int | null, got float", "max_tokens"),
        (b'{"model":"m"}', "messages: expected a list of messages, found nothing", "messages"),
        (b'{"messages":[]}', "messages: expected a list of messages, found []", "messages"),
        (b'{"messages":null}', "messages: expected a list of messages, found null", "messages"),
        (b'{"messages":""}', 'messages: expected a list of messages, found ""', "messages"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_with_its_fault(
    body: bytes, message: str, param: str | None
) -> None:
    with pytest.raises(InvalidRequestError) as found:
        parse_call(body, chat=True)

    assert (str(found.value), found.value.param) == (message, param)


@pytest.mark.parametrize("nothing", ["null", '""', "[]", None])
def test_a_text_completion_needs_a_prompt(nothing: str | None) -> None:
    prompt = "" if nothing is None else f',"prompt":{nothing}'
    with pytest.raises(InvalidRequestError) as found:
        parse_call(f'{{"model":"m"{prompt}}}'.encode(), chat=False)

    assert str(found.value) == f"prompt: expected a prompt, found {nothing or 'nothing'}"


@settings(max_examples=50)
@given(fields=st.dictionaries(st.text(), values, max_size=6))
def test_fields_that_matter_to_nobody_here_are_never_a_reason_to_refuse(
    fields: dict[str, Any],
) -> None:
    known = {"model": "m", "messages": MESSAGES}
    for name in ("session_id", "program_id", "conversation", "metadata", "nvext", "user"):
        known[name] = fields  # type: ignore[assignment]

    call = parse_call(json.dumps({**fields, **known}).encode(), chat=True)

    assert call.models() == ("m",)
    assert json.loads(bytes(call.text())) == MESSAGES


@pytest.mark.parametrize(
    ("fields", "cap"),
    [
        ({}, 4096),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8}, 8),
        ({"max_tokens": 7, "max_completion_tokens": 8}, 8),
        ({"max_tokens": None, "max_completion_tokens": None}, 4096),
        ({"max_tokens": 10**30}, 2**31 - 1),
    ],
)
def test_the_cap_on_output_is_the_callers_or_the_default(
    fields: dict[str, object], cap: int
) -> None:
    assert a_call(**fields).max_output_tokens() == cap


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_cap_below_one_is_refused(field: str) -> None:
    for cap in (0, -3):
        with pytest.raises(InvalidRequestError) as found:
            a_call(**{field: cap}).max_output_tokens()
        assert str(found.value) == f"{field}: expected at least 1, found {cap}"
        assert found.value.param == field


# Sizes and prefixes.


@given(
    shared=st.binary(max_size=4 * CHUNK_BYTES),
    a=st.binary(max_size=2 * CHUNK_BYTES),
    b=st.binary(max_size=2 * CHUNK_BYTES),
)
def test_prefix_hashes_agree_just_as_far_as_the_prompts_do(
    shared: bytes, a: bytes, b: bytes
) -> None:
    one, two = shared + a, shared + b
    hashes = prefix_hashes(memoryview(one)), prefix_hashes(memoryview(two))
    assert [len(found) for found in hashes] == [len(one) // CHUNK_BYTES, len(two) // CHUNK_BYTES]
    for count, pair in enumerate(zip(*hashes, strict=False), start=1):
        end = count * CHUNK_BYTES
        assert (pair[0] == pair[1]) == (one[:end] == two[:end])


def test_prefix_hashes_of_a_giant_prompt_are_bounded() -> None:
    assert len(prefix_hashes(memoryview(bytes(CHUNK_BYTES * 1000)))) == MAX_PREFIX_CHUNKS


@given(size=st.integers(0, 100_000))
def test_prompt_tokens_are_at_least_one(size: int) -> None:
    assert prompt_tokens(memoryview(bytes(size))) == max(1, size // 4)


@pytest.mark.parametrize(
    ("tail", "tokens"),
    [
        (b'{"usage":{"prompt_tokens":3,"completion_tokens":12}}', 12),
        (b'"completion_tokens":1}\n\ndata: {"usage":{"completion_tokens" : 40}}', 40),
        (b'{"usage":null}', None),
        (b"", None),
    ],
)
def test_the_count_of_tokens_is_read_from_the_end_of_an_answer(
    tail: bytes, tokens: int | None
) -> None:
    assert completion_tokens(tail) == tokens


# Answers of our own.


REASONS: dict[str, tuple[int, str, str]] = {
    "model_not_found": (404, "not_found_error", "model_not_found"),
    "too_long": (400, "invalid_request_error", "context_length_exceeded"),
    "queue_full": (429, "rate_limit_error", "rate_limit_exceeded"),
    "waited_too_long": (503, "overloaded_error", "waited_too_long"),
    "no_replica": (503, "overloaded_error", "no_replica"),
    "too_late": (503, "overloaded_error", "too_late"),
    "replica_died": (502, "server_error", "replica_died"),
    "engine_error": (502, "server_error", "engine_error"),
}


def test_every_reason_to_refuse_has_an_answer() -> None:
    assert set(REASONS) >= {*get_args(RejectReason), *get_args(FailReason)}


@pytest.mark.parametrize("reason", [*get_args(RejectReason), *get_args(FailReason)])
def test_a_refusal_has_its_status_an_openai_body_and_a_time_to_come_back(reason: Any) -> None:  # noqa: ANN401
    status, body, headers = refusal(reason, detail=": more", retry_after_s=2.34)

    error = json.loads(body)["error"]
    assert (status, error["type"], error["code"]) == REASONS[reason]
    assert error["message"].endswith(": more")
    assert error["param"] is None
    assert dict(headers) == {b"retry-after": b"2", b"retry-after-ms": b"2340"}
    assert refusal(reason, detail="", retry_after_s=None)[2] == []


def test_a_retry_is_never_asked_for_at_once() -> None:
    _, _, headers = refusal("queue_full", detail="", retry_after_s=0.0)

    assert dict(headers) == {b"retry-after": b"1", b"retry-after-ms": b"1"}


def test_a_callers_mistake_keeps_its_status_code_and_param() -> None:
    status, body = caller_error(ModelNotFoundError("no such model", param="model"))

    assert status == 404
    assert body == error_body(
        "no such model", "not_found_error", code="model_not_found", param="model"
    )


def test_a_response_is_whole() -> None:
    assert response(429, b"{}", [(b"retry-after", b"1")], close=True) == (
        b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\n"
        b"content-length: 2\r\nretry-after: 1\r\nconnection: close\r\n\r\n{}"
    )
