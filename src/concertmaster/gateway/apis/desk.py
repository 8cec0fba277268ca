"""Which path speaks which API: a message becomes a chat call, its agent a translating caller."""

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec

from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.request import ModelName
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.agent import AgentConnection, Message
from concertmaster.gateway.apis.anthropic_answer import MESSAGES, MessageAnswer, TokenCount, speaks
from concertmaster.gateway.apis.anthropic_request import messages_request
from concertmaster.gateway.apis.chat_request import ChatRequest, Fields
from concertmaster.gateway.apis.embeddings import embeddings_call
from concertmaster.gateway.apis.responses_answer import ResponseAnswer, not_found
from concertmaster.gateway.apis.responses_request import response_body, response_request
from concertmaster.gateway.apis.responses_store import ResponseStore, StoredResponse, owner_of
from concertmaster.gateway.apis.translating import TranslatingCaller, Translation
from concertmaster.gateway.exchange import Caller
from concertmaster.gateway.openai_api import CallBody
from concertmaster.gateway.peers import VLLM, Peer, models_for

COUNT_TOKENS = "/v1/messages/count_tokens"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
PATHS = (MESSAGES, COUNT_TOKENS, RESPONSES, EMBEDDINGS)
_CHAT = b"/v1/chat/completions"
_DROPPED_HEADERS = frozenset({b"anthropic-version", b"anthropic-beta", b"x-api-key"})


class Opening(NamedTuple):
    """A call of another API, ready to be decided on.

    Attributes:
        caller: Whom the engine's answer goes to.
        message: What the engine is sent.
        call: What is decided on.
        chat: Whether it is a chat; if not, there is nothing to learn from its answer.
    """

    caller: Caller
    message: Message
    call: CallBody
    chat: bool


class ApiDesk:
    """Opens the calls of all APIs but chat and completions.

    Args:
        embedding_models: Models whose pools serve embeddings.
        new_id: Makes names of responses that nobody guesses.
    """

    def __init__(
        self,
        embedding_models: Collection[ModelName] = (),
        new_id: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self.responses = ResponseStore()
        self.embedding_models = embedding_models
        self._new_id = new_id
        self._open = {
            MESSAGES.encode(): self._messages,
            COUNT_TOKENS.encode(): self._count_tokens,
            RESPONSES.encode(): self._responses,
            EMBEDDINGS.encode(): self._embeddings,
        }

    def serves(self, message: Message) -> bool:
        """Whether a message is a call of one of these APIs."""
        return message.method == b"POST" and message.target.partition(b"?")[0] in self._open

    def caller(self, agent: AgentConnection, message: Message) -> Caller:
        """Return who words errors as the API of a message does."""
        if not speaks(message.target):
            return agent
        takes_chunks = message.takes_chunks
        return TranslatingCaller(agent, MessageAnswer(), streams=False, takes_chunks=takes_chunks)

    def open(self, agent: AgentConnection, message: Message) -> Opening:
        """Read a call.

        Raises:
            CallerError: It is none, or cannot be served.
        """
        try:
            return self._open[message.target.partition(b"?")[0]](agent, message)
        except RecursionError:
            raise InvalidRequestError("body: expected JSON of less depth") from None

    def _messages(self, agent: AgentConnection, message: Message) -> Opening:
        chat, streams = messages_request(message.body)
        return _chat(agent, message, chat, MessageAnswer(), streams=streams)

    def _count_tokens(self, agent: AgentConnection, message: Message) -> Opening:
        chat, _ = messages_request(message.body, counts=True)
        return _chat(agent, message, chat, TokenCount(), streams=False)._replace(chat=False)

    def _embeddings(self, agent: AgentConnection, message: Message) -> Opening:
        call = embeddings_call(message.body, self.embedding_models)
        return Opening(agent, message, call, chat=False)

    def _responses(self, agent: AgentConnection, message: Message) -> Opening:
        body = response_body(message.body)
        owner = owner_of(message)
        earlier: Sequence[Fields] = ()
        workflow_id = ""
        if body.previous_response_id is not None:
            previous = self.responses.find(body.previous_response_id, owner)
            if previous is None:
                raise not_found(body.previous_response_id)
            earlier, workflow_id = previous.said(), previous.workflow_id
        asked = response_request(body, earlier, workflow_id)

        def keep(response: Fields, said: list[Fields], workflow_id: str) -> None:
            self.responses.add(
                response["id"],
                StoredResponse(
                    owner=owner,
                    body=msgspec.json.encode(response),
                    messages=msgspec.json.encode(said),
                    workflow_id=workflow_id,
                ),
            )

        answer = ResponseAnswer(asked, f"resp_{self._new_id()}", keep)
        return _chat(agent, message, asked.chat, answer, streams=asked.streams)


def served(
    scheduler: Scheduler, peers: Mapping[ReplicaId, Peer]
) -> tuple[ApiDesk, tuple[ModelName, ...]]:
    """Return the desk of a fleet, and the models that ``auto`` may mean in a chat.

    These are none, for any, where every replica takes chats.
    """
    pools = {replica.replica_id: replica.pool for replica in scheduler.replicas.values()}
    embeds = models_for("embeddings", pools, peers)
    chats = models_for("chat", pools, peers)
    takes_all = all(peers.get(one, VLLM).serves != "embeddings" for one in pools)
    return ApiDesk(embeds), () if takes_all else chats


def _chat(
    agent: AgentConnection,
    message: Message,
    chat: ChatRequest,
    translation: Translation,
    *,
    streams: bool,
) -> Opening:
    caller = TranslatingCaller(
        agent,
        translation,
        streams=streams,
        takes_chunks=message.takes_chunks,
        left_out=chat.left_out,
    )
    headers = {k: v for k, v in message.headers.items() if k not in _DROPPED_HEADERS}
    key = message.headers.get(b"x-api-key")
    if key is not None:
        headers.setdefault(b"authorization", b"Bearer " + key)
    engines = message._replace(target=_CHAT, headers=headers, body=chat.body)
    return Opening(caller, engines, chat.call, chat=True)
