import asyncio
import json
import random
import socket

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import a_fleet, a_policy, a_pool
from concertmaster.gateway import driver
from gateway_rig import (
    CHAT,
    STREAM_HEAD,
    Heard,
    Rig,
    Wire,
    a_body,
    a_call,
    a_chunk,
    a_message,
    an_answer,
    events,
    exactly,
    hangs,
    over_engines,
    over_upstreams,
    play,
    until,
)

# The official client.


def test_the_openai_client_gets_a_whole_answer() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _), rig.sdk() as client:
            answer = await client.chat.completions.create(
                model="auto", messages=[{"role": "user", "content": "hi"}], max_tokens=5
            )
            assert answer.model == "m"
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 5
            assert answer._request_id
            await rig.idle()

    play(main())


def test_the_openai_client_gets_a_stream_with_its_usage() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _), rig.sdk() as client:
            stream = await client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=20,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 20
            await rig.idle()
            assert rig.gateway.metrics.output_tokens == 20
            assert rig.gateway.metrics.ttft_s.buckets()[-1][1] == 1

    play(main())


def test_the_openai_client_gets_a_text_completion_and_the_list_of_models() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _), rig.sdk() as client:
            answer = await client.completions.create(model="auto", prompt="Once", max_tokens=3)
            assert answer.choices[0].finish_reason in {"stop", "length"}
            assert [model.id for model in (await client.models.list()).data] == ["auto", "m"]

    play(main())


def test_an_unknown_model_is_not_found_and_the_known_ones_are_named() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _), rig.sdk() as client:
            with pytest.raises(openai.NotFoundError) as refusal:
                await client.chat.completions.create(
                    model="gpt", messages=[{"role": "user", "content": "hi"}]
                )
            assert refusal.value.code == "model_not_found"
            assert refusal.value.request_id
            assert refusal.value.body is not None
            assert 'expected one of m or "auto", found "gpt"' in str(refusal.value)

    play(main())


def test_an_engines_refusal_is_passed_on_with_its_own_words_and_not_retried() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _), rig.sdk() as client:
            with pytest.raises(openai.BadRequestError, match="n must be 1"):
                await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "hi"}], n=2
                )
            await rig.idle()
            assert await rig.metric('concertmaster_requests_total{code="400"}') == 1

    play(main())


def test_a_full_line_is_a_rate_limit_with_a_time_to_come_back() -> None:
    async def main() -> None:
        fleet = a_fleet(a_pool(max_sequences=1))
        policy = a_policy(max_waiting=1)
        async with over_upstreams(hangs, fleet=fleet, policy=policy) as (rig, upstream):
            wires = [await rig.wire() for _ in range(2)]
            for wire in wires:
                wire.send(a_call())
            await until(lambda: rig.gateway.open_exchanges == 2)
            async with rig.sdk() as client:
                with pytest.raises(openai.RateLimitError) as refusal:
                    await client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": "hi"}]
                    )
            assert "the waiting line is full" in str(refusal.value)
            assert refusal.value.code == "rate_limit_exceeded"
            assert int(refusal.value.response.headers["retry-after-ms"]) >= 1
            assert int(refusal.value.response.headers["retry-after"]) >= 1
            assert len(upstream.heard) == 1
            for wire in wires:
                await wire.close()
            await rig.idle()

    play(main())


def test_a_prompt_too_long_for_every_model_is_a_bad_request() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            reply = await rig.call({"messages": [{"role": "user", "content": "x" * 140_000}]})
            assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
            assert not upstream.heard

    play(main())


# Headers.


def test_the_answer_says_which_model_which_replica_and_why() -> None:
    async def main() -> None:
        async with over_engines(2, policy=a_policy("least-tokens")) as (rig, _):
            reply = await rig.call(
                {**exactly(2)}, x_request_id="mine-1", x_concertmaster_workflow_id="flow-1"
            )
            assert reply.status == 200
            assert reply.headers["x-request-id"] == "mine-1"
            assert reply.headers["x-concertmaster-workflow-id"] == "flow-1"
            assert "x-concertmaster-workflow-confidence" not in reply.headers
            assert reply.headers["x-concertmaster-model"] == "m"
            assert reply.headers["x-concertmaster-replica"] in {"p-0", "p-1"}
            assert float(reply.headers["x-concertmaster-queue-wait-ms"]) >= 0
            assert reply.headers["x-concertmaster-why"].startswith("least-tokens")
            inferred = await rig.call({**exactly(2)})
            assert inferred.headers["x-concertmaster-workflow-id"].startswith("inferred-")
            assert inferred.headers["x-concertmaster-workflow-confidence"] == "0.50"

    play(main())


def test_what_the_core_is_told_of_a_call_is_what_its_headers_say() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            await rig.call(
                {"max_tokens": 7},
                x_concertmaster_workflow_id="flow",
                x_concertmaster_app="review",
                x_concertmaster_role="critic",
                x_concertmaster_template="loop",
                x_concertmaster_step="vote",
                x_concertmaster_stage="3",
                x_concertmaster_parent="flow/1, flow/2",
                x_concertmaster_deadline_ms="2500",
                x_concertmaster_class="batch",
            )
            request = next(e.request for e in rig.history if hasattr(e, "request"))
            assert (request.workflow_id, request.app, request.role) == ("flow", "review", "critic")
            assert (request.template, request.step) == ("loop", "vote")
            assert (request.stage, request.parents) == (3, ("flow/1", "flow/2"))
            assert request.deadline_s == pytest.approx(request.arrival_s + 2.5)
            assert (request.service_class, request.max_output_tokens) == ("batch", 7)

    play(main())


def test_a_request_id_that_is_in_flight_already_gets_another() -> None:
    async def main() -> None:
        async def slow(_: Heard, out: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.02)
            out.write(an_answer(b"{}"))

        async with over_upstreams(slow) as (rig, upstream):
            replies = await asyncio.gather(
                *(rig.call(x_request_id=name) for name in ("cm-1", "cm-2", "same", "same"))
            )
            assert [reply.status for reply in replies] == [200] * 4
            assert len({heard.headers["x-request-id"] for heard in upstream.heard}) == 4
            assert {"cm-1", "cm-2", "same"} < {r.headers["x-request-id"] for r in replies}

    play(main())


# Bytes.


def test_a_named_model_passes_the_body_on_byte_for_byte() -> None:
    async def main() -> None:
        body = (
            b'{ "model" :"m","messages": [ {"role":"user","content":"h\\u00e9 \xc3\xa9"} ],\n'
            b'"tools":[{"type":"function","function":{"name":"f","parameters":{"a": 1.0e+3}}}],'
            b'"x_unknown":{"deep":[1e400,  null]},"seed":123456789012345678901234567890}'
        )
        async with over_upstreams() as (rig, upstream):
            reply = await rig.ask(
                "POST", CHAT, body, content_type="application/json", x_mine="kept"
            )
            assert reply.status == 200
            heard = upstream.heard[0]
            assert heard.body == body
            assert heard.line == f"POST {CHAT} HTTP/1.1"
            assert heard.headers["x-mine"] == "kept"
            assert heard.headers["host"] == f"127.0.0.1:{upstream.port}"
            assert heard.headers["content-length"] == str(len(body))

    play(main())


@pytest.mark.parametrize("model", ["auto", ["m", "other"], ["auto", "m"]])
def test_a_free_choice_of_model_changes_the_model_alone(model: object) -> None:
    async def main() -> None:
        body = a_body(model=model, tools=[{"type": "function", "x": [1.5, None]}], x_more={"a": {}})
        async with over_upstreams() as (rig, upstream):
            await rig.ask("POST", CHAT, json.dumps(body).encode())
            assert upstream.heard[0].json == {**body, "model": "m"}

    play(main())


def test_credentials_pass_and_hop_by_hop_headers_do_not() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            wire = await rig.wire()
            named = {"authorization": "Bearer k", "te": "trailers", "connection": "keep-alive"}
            named |= {"proxy-authorization": "x", "accept-encoding": "gzip", "traceparent": "00-1"}
            wire.send(a_message("POST", f"{CHAT}?beta=1", json.dumps(a_body()).encode(), named))
            assert (await wire.answer())[0] == 200
            heard = upstream.heard[0]
            assert heard.line == f"POST {CHAT}?beta=1 HTTP/1.1"
            assert heard.headers["authorization"] == "Bearer k"
            assert heard.headers["traceparent"] == "00-1"
            dropped = ("te", "connection", "proxy-authorization", "accept-encoding")
            assert not any(name in heard.headers for name in dropped)

    play(main())


def pieces(data: bytes, rng: random.Random) -> list[bytes]:
    """Cut bytes at random places."""
    cuts = sorted(rng.sample(range(1, len(data)), k=min(len(data) - 1, rng.randint(0, 30))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


async def dechunked(wire: Wire) -> bytes:
    """Read a chunked body, and nothing after it."""
    body = b""
    async with asyncio.timeout(10):
        while size := int(await wire.reader.readuntil(b"\r\n"), 16):
            body += (await wire.reader.readexactly(size + 2))[:-2]
        assert await wire.reader.readexactly(2) == b"\r\n"
    return body


@settings(max_examples=12)
@given(
    texts=st.lists(st.text(max_size=200).map(str.encode), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
)
def test_however_an_engine_cuts_its_stream_the_bytes_are_the_same(
    texts: list[bytes], seed: int
) -> None:
    rng = random.Random(seed)
    frames = [b"data: " + text.replace(b"\n", b" ") + b"\n\n" for text in texts]
    sent = STREAM_HEAD + b"".join(map(a_chunk, frames)) + b"0\r\n\r\n"

    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        for piece in pieces(sent, rng):
            out.write(piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0.0005 * rng.randint(0, 2))

    async def main() -> None:
        async with over_upstreams(script) as (rig, _):
            wire = await rig.wire()
            for _ in range(2):  # the connections are as good as before
                wire.send(a_call(stream=True))
                assert (await wire.head()).startswith(b"HTTP/1.1 200 OK\r\n")
                assert await dechunked(wire) == b"".join(frames)
            await wire.close()
            await rig.idle()

    play(main())


def test_fifty_streams_at_once_are_never_mixed() -> None:
    rng = random.Random(5)

    async def script(heard: Heard, out: asyncio.StreamWriter) -> None:
        name = heard.headers["x-request-id"]
        for piece in pieces(STREAM_HEAD + events(*(f"{name}:{n}" for n in range(40))), rng):
            out.write(piece)
            await asyncio.sleep(0.001 * rng.randint(0, 3))

    async def one(rig: Rig, name: str) -> None:
        wire = await rig.wire()
        body = json.dumps(a_body(stream=True)).encode()
        for part in "ab":
            wire.send(a_message("POST", CHAT, body, {"x-request-id": name + part}))
            assert f"x-request-id: {name}{part}\r\n".encode() in await wire.head()
            frames = [f'data: "{name}{part}:{n}"\n\n' for n in range(40)]
            assert (await dechunked(wire)).decode() == "".join(frames) + "data: [DONE]\n\n"

    async def main() -> None:
        async with over_upstreams(script, script) as (rig, _):
            await asyncio.gather(*(one(rig, f"r{i}") for i in range(50)))
            await rig.idle()

    play(main())


def test_a_slow_reader_gets_every_byte_and_slows_the_engine_down() -> None:
    sent_bytes = 0
    block = b"x" * 100_000

    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        nonlocal sent_bytes
        out.write(STREAM_HEAD)
        for piece in 200 * [block]:
            out.write(a_chunk(piece))
            await out.drain()
            sent_bytes += len(piece)
        out.write(b"0\r\n\r\n")

    async def main() -> None:
        async with over_upstreams(script) as (rig, _):
            wire = await rig.wire()
            wire.reader._limit = 2**16  # type: ignore[attr-defined]
            wire.send(a_call(stream=True))
            await wire.head()
            await asyncio.sleep(0.2)
            before = sent_bytes
            await asyncio.sleep(0.1)
            assert sent_bytes == before < 200 * len(block), "the engine was not held back"
            assert await dechunked(wire) == 200 * block
            wire.send(a_call(stream=True))
            await wire.head()
            assert len(await dechunked(wire)) == 200 * len(block)
            await wire.close()
            await rig.idle()

    play(main())


def test_an_engine_that_was_held_back_at_its_last_bytes_is_read_again_for_the_next_call() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            wire = await rig.wire()
            wire.send(a_call())
            await wire.answer()
            (caller,) = rig.gateway._agents
            write = caller.write

            def write_and_fill(data: bytes) -> None:
                write(data)
                caller.pause_writing()  # as asyncio does when the last bytes fill the buffer

            caller.write = write_and_fill  # type: ignore[method-assign]
            wire.send(a_call())
            await wire.answer()
            caller.write = write  # type: ignore[method-assign]
            caller.resume_writing()
            wire.send(a_call())
            assert (await wire.answer())[0] == 200
            assert upstream.connections == 1

    play(main())


def test_small_packets_are_sent_at_once_on_both_sides() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            wire = await rig.wire()
            wire.send(a_call())
            await wire.answer()
            (caller,) = rig.gateway._agents
            (link,) = rig.gateway.links.values()
            (engine,) = link._all
            for side in (caller, engine):
                assert side._transport is not None
                sock = side._transport.get_extra_info("socket")
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    play(main())


def test_the_core_is_told_how_far_streams_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD + b"".join(a_chunk(b'data: {"x":%d}\n\n' % i) for i in range(30)))
        await asyncio.sleep(0.1)
        out.write(events())

    async def main() -> None:
        async with over_upstreams(script) as (rig, _):
            reply = asyncio.ensure_future(rig.call({"stream": True, "max_tokens": 50}))
            await until(rig.replica)
            await until(
                lambda: [c.streamed_tokens for c in rig.replica().in_flight.values()] == [30]
            )
            assert (await reply).status == 200
            await rig.idle()

    monkeypatch.setattr(driver, "PROGRESS_S", 0.01)
    play(main())
