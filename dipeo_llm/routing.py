"""Which deployment of a route a call goes to, and which one after a failure.

Chooses and keeps the accounts; the service sends. `litellm.Router` is not used:
docs/routing.md says why.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Self, TypeVar, cast

from dipeo_llm.deployments import DeploymentStates
from dipeo_llm.domain import Capabilities, ChatRequest, ChatResult, StreamChunk
from dipeo_llm.errors import (
    APIKeyError,
    CallError,
    ContextWindowError,
    DiPeOLLMError,
    InvalidRequestError,
    LLMServiceError,
    LLMTimeoutError,
    ModelNotFoundError,
    QuotaExceededError,
    RateLimitError,
    ServiceUnavailableError,
)
from dipeo_llm.limits import Limit, RateLimits, Reservation
from dipeo_llm.progress import CallProgress
from dipeo_llm.redis_clients import RedisClients
from dipeo_llm.retry import RetryPolicy
from dipeo_llm.routes import Deployment, Routes
from dipeo_llm.settings import Settings
from dipeo_llm.streaming import Items, Opened

_T = TypeVar("_T")

_EXPLORE = 0.05
"""The share of calls that "latency" sends to any deployment, so that a slow one is timed
again."""
_OWN = ("context_window", "input_usd_per_million", "output_usd_per_million")
"""Fields of a deployment that win over what is known about its model."""
_USUAL_OUTPUT = 256
"""Tokens of an answer without `max_tokens`, for the limits and the price."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a request needs from a deployment."""

    tokens: int
    """Input tokens, estimated: 4 bytes of text are one."""
    output: int
    features: frozenset[str]
    """Fields of `Capabilities` that must not be False: tools, vision, pdf, audio."""

    @classmethod
    def of(cls, request: ChatRequest) -> "Need":
        """Read the need of a request, before its media are loaded."""
        features = {"tools"} if request.tools else set()
        size = 0
        for message in request.messages:
            content: Any = message.get("content") or ()
            if isinstance(content, str):
                size += _bytes(content)
                continue
            # Anything else is refused when the media are loaded.
            parts = content if isinstance(content, list | tuple) else ()
            for part in (each for each in parts if isinstance(each, Mapping)):
                features |= _FEATURES.get(str(part.get("type")), set())
                size += _bytes(part.get("text") or "")
        output = request.sampling.get("max_tokens") or _USUAL_OUTPUT
        return cls(size // 4 + 4 * len(request.messages), output, frozenset(features))


_FEATURES = {
    "image_url": {"vision"},
    "input_image": {"vision"},
    "image": {"vision"},
    "file": {"pdf"},
    "input_file": {"pdf"},
    "document": {"pdf"},
    "input_audio": {"audio"},
}


def _bytes(text: Any) -> int:
    if not isinstance(text, str):
        return 0
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


@dataclass(frozen=True, slots=True)
class DeploymentHealth:
    """What `service.routes()` says of one deployment."""

    name: str
    model: str
    cooling: float
    """Seconds until it gets calls again; 0 if it does now."""
    reason: str | None
    """The error that started the last cool-down."""
    calls: int
    """Requests of this process that ended."""
    failures: int
    """Those of them that failed through the deployment's fault."""
    in_flight: int
    """Calls of this process."""
    latency: float | None
    """Average seconds to the first content of a stream, else to a whole answer."""
    requests_per_minute: int
    """Requests of the last 60 s, and tokens, as this process last knew them; counted if
    the deployment has a limit, or the route's strategy is "usage"."""
    tokens_per_minute: int


@dataclass(frozen=True, slots=True)
class RouteHealth:
    """What `service.routes()` says of one route."""

    name: str
    strategy: str
    deployments: tuple[DeploymentHealth, ...]

    @property
    def is_available(self) -> bool:
        """Whether a deployment gets calls now."""
        return any(not each.cooling for each in self.deployments)


class Routing:
    """The routes of a service and the state of their deployments.

    Args:
        routes: The configuration.
        describe: Returns what LiteLLM's table says about a deployment's model.
        settings: The longest wait.
        redis: The server that processes share; None for this process alone.
    """

    def __init__(
        self,
        routes: Routes,
        *,
        describe: Callable[[Deployment], Capabilities],
        settings: Settings,
        redis: RedisClients | None = None,
    ) -> None:
        self.routes = routes.routes
        self.settings = settings
        self.limits = RateLimits(redis)
        self.states = DeploymentStates(redis)
        self._redis = redis
        self._describe = describe
        self._known: dict[tuple[str, tuple[Any, ...]], Capabilities] = {}
        self.is_closing = False
        self._ids = sorted({d.id for r in self.routes.values() for d in r.deployments})

    def find(self, model: Any, service: Any) -> str | None:
        """Return the name of the route that a call asks for, None for a model."""
        is_named = isinstance(model, str) and not service
        return model if is_named and model in self.routes else None

    async def choose(
        self,
        name: str,
        request: ChatRequest,
        session: str | None,
        progress: CallProgress,
    ) -> "Choices":
        """Return the deployments that may answer a call, from which it takes one at a time."""
        await self.states.refresh(self._ids)
        choices = Choices(self, name, Need.of(request), session, progress)
        if choices.session is not None:
            choices.warm = await self.states.find_session(choices.session)
        return choices

    def deployments(self, name: str) -> tuple[Deployment, ...]:
        """Return the deployments of a route."""
        return self.routes[name].deployments

    def capabilities(self, deployment: Deployment) -> Capabilities:
        """Return what is known about a deployment's model; its own fields win."""
        # Two routes may say different things about one deployment.
        own = tuple(getattr(deployment, name) for name in _OWN)
        if (known := self._known.get((deployment.id, own))) is None:
            pairs = zip(_OWN, own, strict=True)
            update = {name: value for name, value in pairs if value is not None}
            known = self._describe(deployment).model_copy(update=update)
            self._known[deployment.id, own] = known
        return known

    def check(self) -> None:
        """Look up the model of every deployment. Imports LiteLLM.

        Raises:
            InvalidRequestError: One cannot be placed; the message names the deployment.
        """
        for name, route in self.routes.items():
            for deployment in route.deployments:
                try:
                    self.capabilities(deployment)
                except InvalidRequestError as exc:
                    raise InvalidRequestError(
                        f"deployment {deployment.label!r} of route {name!r}: {exc}",
                        model=deployment.model,
                    ) from exc

    def health(self) -> dict[str, RouteHealth]:
        """Return the state of every route."""
        return {
            name: RouteHealth(
                name, route.strategy, tuple(map(self._health, route.deployments))
            )
            for name, route in self.routes.items()
        }

    def _health(self, deployment: Deployment) -> DeploymentHealth:
        state = self.states[deployment.id]
        requests, tokens = self.limits.used(deployment.id)
        return DeploymentHealth(
            name=deployment.label,
            model=deployment.model,
            cooling=state.cooling,
            reason=state.reason,
            calls=state.calls,
            failures=state.failures,
            in_flight=state.in_flight,
            latency=state.latency.get(True, state.latency.get(False)),
            requests_per_minute=requests,
            tokens_per_minute=tokens,
        )

    async def aclose(self) -> None:
        """Wait for what is on its way to Redis, and close its clients."""
        await asyncio.gather(self.limits.aclose(), self.states.aclose())
        if self._redis is not None:
            await self._redis.aclose()

    def reopen(self) -> None:
        """Allow clients again after `aclose`."""
        self.is_closing = False
        if self._redis is not None:
            self._redis.reopen()


class Choices:
    """The deployments of one call, of which each is taken at most once.

    The route's own come first, then those of its fallbacks. A deployment that cannot hold
    or do what the request needs is passed over, unless none of all can. Only after the
    last one failed is it tried again, as a model without a route is.
    """

    def __init__(
        self,
        routing: Routing,
        name: str,
        need: Need,
        session: str | None,
        progress: CallProgress,
    ) -> None:
        self.name = name
        self.warm: str | None = None
        """The deployment where the session's prompt cache is."""
        self._routing = routing
        self._route = route = routing.routes[name]
        self._need = need
        self._progress = progress
        self._policy = RetryPolicy(routing.settings, progress)
        self._groups = self._list_groups()
        self._again: Deployment | None = None
        self._last: Deployment | None = None
        self._failures: list[tuple[Deployment, DiPeOLLMError]] = []
        progress.route = name
        has_choice = route.affinity and len(route.deployments) > 1
        self.session = _digest(name, session) if session and has_choice else None

    async def take(self) -> "Turn":
        """Choose a deployment and wait for its turn.

        Raises:
            RateLimitError: Each one is at a limit or in a cool-down, and the route does
                not wait, or not for so long; `retry_after` says when to come back.
        """
        while True:
            try:
                turn = await self._take_one()
            except RateLimitError as exc:
                raise self.error(exc) from None
            if isinstance(turn, Turn):
                return turn
            self._check_wait(turn)
            await asyncio.sleep(turn)
            self._progress.queued += turn

    def next_wait(self, error: DiPeOLLMError) -> float | None:
        """Note a failure, and return the seconds until the next `take`; None to give up."""
        if self._last is not None:
            self._failures.append((self._last, error))
        if isinstance(error, ContextWindowError):
            self._look_for_more_room()
        may_move = _may_move(error) and not self._was_closed(error)
        has_other = may_move and self._has_other(error)
        wait = self._policy.next_wait(error, is_elsewhere=has_other)
        # Also if the others begin a cool-down meanwhile.
        is_again = not has_other or getattr(error, "retryable", False)
        self._again = self._last if is_again else None
        return wait

    def error(self, last: DiPeOLLMError) -> DiPeOLLMError:
        """Return the error to raise: the first where all deployments failed, with all.

        That a model cannot do what is asked counts only if no other failed otherwise.
        """
        failures = [each for _, each in self._failures]
        sent = [each for each in failures if not isinstance(each, InvalidRequestError)]
        error = next(iter(sent or failures), last) if _may_move(last) else last
        if isinstance(error, CallError):
            error.attempts = self._progress.attempts
            error.details = {
                **error.details,
                "route": self.name,
                "tried": [
                    {
                        "deployment": deployment.label,
                        "error": type(each).__name__,
                        "status_code": getattr(each, "status_code", None),
                    }
                    for deployment, each in self._failures
                ],
            }
        return error

    def forget(self) -> None:
        """Drop the errors, whose tracebacks keep the call and these choices alive."""
        self._failures.clear()

    # Candidates.

    def _list_groups(self, kind: str = "fallbacks") -> list[list[Deployment]]:
        """Return the deployments that fit by route, the call's own first."""
        routes, names = self._routing.routes, [self.name]
        own = routes[self.name].deployments
        if not any(map(self._has_room, own)):
            kind = _CONTEXT
        groups: list[list[Deployment]] = []
        ids: set[str] = set()
        for name in names:
            route = routes[name]
            others = getattr(route, kind) or route.fallbacks
            names += [other for other in others if other not in names]
            group = [each for each in route.deployments if each.id not in ids]
            ids.update(each.id for each in group)
            groups.append([each for each in group if self._fits(each)])
        return groups if any(groups) else [list(own)]

    def _has_room(self, deployment: Deployment) -> bool:
        window = self._routing.capabilities(deployment).context_window
        return window is None or self._need.tokens <= window

    def _fits(self, deployment: Deployment) -> bool:
        known = self._routing.capabilities(deployment)
        for feature in self._need.features:
            has = getattr(known, feature)
            # LiteLLM's rows leave out the media that a model does not take.
            is_left_out = known.context_window is not None and feature != "tools"
            if has is False or (has is None and is_left_out):
                return False
        is_too_large = deployment.tpm is not None and self._need.tokens > deployment.tpm
        return self._has_room(deployment) and not is_too_large

    def _look_for_more_room(self) -> None:
        """Leave the deployments that have more room than the last one, or may have."""
        failed = {each.id for each, _ in self._failures}
        groups = self._list_groups(_CONTEXT)
        self._groups = [
            [each for each in group if each.id not in failed and self._has_more(each)]
            for group in groups
        ]

    def _has_more(self, deployment: Deployment) -> bool:
        if self._last is None:
            return True
        known = self._routing.capabilities
        window, new = known(self._last).context_window, known(deployment).context_window
        if window is None or new is None:
            return deployment.model != self._last.model
        return new > window

    def _has_other(self, error: DiPeOLLMError) -> bool:
        """Say whether to go on to a deployment that was not tried.

        One in a cool-down is worth a wait only if the last one is not worth a retry.
        """
        states = self._routing.states
        waits = self._route.when_busy == "wait" and not getattr(
            error, "retryable", False
        )
        return any(
            waits or not states[each.id].cooling
            for group in self._groups
            for each in group
        )

    def _was_closed(self, error: DiPeOLLMError) -> bool:
        """Say whether a call failed because the service closes."""
        return (
            self._routing.is_closing
            and isinstance(error, ServiceUnavailableError)
            and not (error.status_code or error.retryable)
        )

    # Choosing.

    async def _take_one(self) -> "Turn | float":
        """Return a turn, or the seconds to wait before one may be had."""
        waits: list[float] = []
        for group in self._groups:
            ready = [each for each in group if not self._cooling(each, waits)]
            limited: list[tuple[float, Deployment]] = []
            while ready:
                chosen = await self._prefer(ready)
                try:
                    return await self._begin(chosen, wait=False)
                except RateLimitError as exc:
                    limited.append((exc.retry_after or 0.0, chosen))
                    ready.remove(chosen)
            if limited and self._route.when_busy == "wait":
                _, soonest = min(limited, key=lambda each: each[0])
                try:
                    return await self._begin(soonest, wait=True)
                except RateLimitError:  # not within the deadline
                    pass
            waits += [wait for wait, _ in limited]
        if self._again is not None:
            again, self._again = self._again, None
            return await self._begin(again, wait=self._route.when_busy == "wait")
        return min(waits, default=0.0)

    def _cooling(self, deployment: Deployment, waits: list[float]) -> bool:
        if cooling := self._routing.states[deployment.id].cooling:
            waits.append(cooling)
        return cooling > 0

    def _check_wait(self, seconds: float) -> None:
        """Raise if the route does not wait, or if the wait is too long."""
        longest = min(self._routing.settings.retry_after_max, self._progress.left())
        if self._route.when_busy == "wait" and seconds < longest:
            return
        raise self.error(
            RateLimitError(
                f"no deployment of route {self.name!r} takes calls now; the first one"
                f" does in {seconds:.1f} s",
                model=self.name,
                retry_after=seconds,
                retryable=False,
            )
        )

    async def _prefer(self, ready: Sequence[Deployment]) -> Deployment:
        """Return the deployment that the strategy puts first; of equals, one by weight."""
        if len(ready) == 1:
            return ready[0]
        for each in ready:
            if each.id == self.warm:
                return each
        scores = await self._score(ready)
        best = min(scores)
        equal = [
            each for each, score in zip(ready, scores, strict=True) if score <= best
        ]
        return random.choices(equal, [each.weight for each in equal])[0]  # noqa: S311

    async def _score(self, ready: Sequence[Deployment]) -> list[float]:
        """Return a number for each deployment; the lowest is the best."""
        states = self._routing.states
        match self._route.strategy:
            case "cost":
                return [self._price(each) for each in ready]
            case "load":
                counts = await states.count_in_flight([each.id for each in ready])
                pairs = zip(counts, ready, strict=True)
                return [count / each.weight for count, each in pairs]
            case "latency" if random.random() >= _EXPLORE:  # noqa: S311
                is_stream = self._progress.is_stream
                return [states[each.id].latency.get(is_stream, 0.0) for each in ready]
            case "usage":
                return [self._use(each) for each in ready]
        return [0.0] * len(ready)

    def _price(self, deployment: Deployment) -> float:
        """Return the likely USD of the request, times a million; infinite if unknown."""
        known = self._routing.capabilities(deployment)
        prices = (known.input_usd_per_million, known.output_usd_per_million)
        if prices[0] is None or prices[1] is None:
            return math.inf
        return prices[0] * self._need.tokens + prices[1] * self._output(known)

    def _output(self, known: Capabilities) -> int:
        # DiPeO asks for 256,000 tokens of any model; the adapter lowers that too.
        return min(self._need.output, known.max_output or self._need.output)

    def _size(self, deployment: Deployment) -> int:
        """Return the tokens to reserve: what is sent, and what may be answered."""
        tokens = self._need.tokens
        size = tokens + self._output(self._routing.capabilities(deployment))
        return (
            size if deployment.tpm is None else min(size, max(deployment.tpm, tokens))
        )

    def _use(self, deployment: Deployment) -> float:
        """Return the share of its limits that a deployment has used up."""
        requests, tokens = self._routing.limits.used(deployment.id)
        limits = (deployment.rpm or _NO_LIMIT, deployment.tpm or _NO_LIMIT)
        return max(requests / limits[0], tokens / limits[1])

    async def _begin(self, deployment: Deployment, *, wait: bool) -> "Turn":
        """Reserve what the request needs, and count the call."""
        reservation = None
        limit = Limit(deployment.rpm, deployment.tpm)
        if limit.rpm or limit.tpm or self._route.strategy == "usage":
            reservation = await self._routing.limits.reserve(
                deployment.id,
                limit,
                self._size(deployment),
                ends=self._progress.ends,
                wait=wait,
            )
            self._progress.queued += reservation.queued
        self._last = deployment
        for group in self._groups:
            if deployment in group:
                group.remove(deployment)
        return Turn(self, deployment, reservation)

    # What a turn asks for.

    @property
    def attempts(self) -> int:
        """The attempts of the call so far."""
        return self._progress.attempts

    def start(self, deployment: Deployment) -> Callable[[], None]:
        """Count a call in flight, and note the deployment as tried."""
        self._progress.deployment = deployment.label
        self._progress.tried.append(deployment.label)
        return self._routing.states.begin(
            deployment.id, is_shared=self._route.strategy == "load"
        )

    def succeed(self, deployment: Deployment, seconds: float) -> None:
        """Note an answer."""
        state = self._routing.states[deployment.id]
        state.calls += 1
        state.failures_in_a_row = 0
        state.add_latency(seconds, is_stream=self._progress.is_stream)
        if self.session is not None and deployment in self._route.deployments:
            self._routing.states.keep_session(self.session, deployment.id)

    def blame(self, deployment: Deployment, error: BaseException) -> None:
        """Note a failure, and start a cool-down if it was the deployment's fault."""
        state = self._routing.states[deployment.id]
        state.calls += 1
        if not isinstance(error, CallError) or not _is_deployments_fault(error):
            return
        if self._was_closed(error):
            return
        state.failures += 1
        state.failures_in_a_row += 1
        is_at_once = isinstance(error, _AT_ONCE) or _never_answered(error)
        if self._route.cooldown and (
            is_at_once or state.failures_in_a_row >= self._route.failures
        ):
            status = f" {error.status_code}" if error.status_code else ""
            self._routing.states.cool(
                deployment.id,
                self._route.cooldown
                if error.retry_after is None
                else error.retry_after,
                f"{type(error).__name__}{status}",
            )

    def mark(self, result: ChatResult[Any]) -> None:
        """Say in a result which deployment answered, and which were tried."""
        result.deployment = self._progress.deployment
        result.tried = list(self._progress.tried)


class Turn:
    """One request of a call to one deployment.

    A context manager. Its accounts are settled exactly once: with the answer, with the
    failure, or when the call is cancelled or its stream is left.
    """

    def __init__(
        self, choices: Choices, deployment: Deployment, reservation: Reservation | None
    ) -> None:
        self.deployment = deployment
        self._choices = choices
        self._reservation = reservation
        self._begun = time.monotonic()
        self._attempts = choices.attempts
        self._is_over = False
        self._is_held = False
        self._end_flight = choices.start(deployment)

    async def __aenter__(self) -> Self:
        return self

    def fail(self, error: DiPeOLLMError) -> float | None:
        """Settle a failure; return the seconds until the next turn, None to give up."""
        self._end(error=error)
        return self._choices.next_wait(error)

    async def __aexit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        if not self._is_held:
            self._end(error=error)

    async def hold(self, answer: _T) -> _T:
        """Settle an answer, or hold the turn until a stream ends or is left."""
        if isinstance(answer, ChatResult):
            self._choices.mark(answer)
            self._end(result=answer)
        elif isinstance(answer, Opened):
            self._is_held = True
            items = self._pass_on(answer, time.monotonic() - self._begun)
            # A generator that has not begun would not close the stream below it.
            return cast(_T, Opened(items, await anext(items)))
        return answer

    async def _pass_on(self, opened: Opened, seconds: float) -> Items:
        item: StreamChunk | ChatResult[Any] = opened.first
        try:
            while not isinstance(item, ChatResult):
                yield item
                item = await anext(opened.items)
            self._choices.mark(item)
            self._end(result=item, seconds=seconds)
            yield item
        except StopAsyncIteration:
            return
        except DiPeOLLMError as exc:
            self._end(error=exc)
            raise
        finally:
            self._end()
            await opened.items.aclose()

    def _end(
        self,
        *,
        result: ChatResult[Any] | None = None,
        error: BaseException | None = None,
        seconds: float | None = None,
    ) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._end_flight()
        if result is not None:
            passed = time.monotonic() - self._begun if seconds is None else seconds
            self._choices.succeed(self.deployment, passed)
        elif error is not None:
            self._choices.blame(self.deployment, error)
        if self._reservation is None:
            return
        if result is not None:
            usage = result.token_usage
            self._reservation.settle(usage.total if usage else None)
        elif self._choices.attempts == self._attempts or _was_not_sent(error):
            self._reservation.refund()
        else:
            # A refused request has used no tokens; those of a cancelled one are unknown.
            has_status = getattr(error, "status_code", None) not in {None, 200}
            self._reservation.settle(0 if has_status else None)


_CONTEXT = "context_window_fallbacks"
_NO_LIMIT = 1e12
_AT_ONCE = (APIKeyError, ModelNotFoundError, RateLimitError)
"""Errors of an account or a limit: the next request would get them too."""


def _digest(*names: str) -> str:
    """Return a short name for a session, which the application may have made of a text."""
    return blake2b(json.dumps(names).encode(), digest_size=16).hexdigest()


def _is_deployments_fault(error: CallError) -> bool:
    """Say whether another deployment might answer the same request."""
    if isinstance(error, RateLimitError):
        # One that is not retryable is about the size of this request.
        return error.retryable or isinstance(error, QuotaExceededError)
    known = (APIKeyError, ModelNotFoundError, ServiceUnavailableError, LLMTimeoutError)
    return isinstance(error, known) or type(error) is LLMServiceError


def _never_answered(error: CallError) -> bool:
    """Say whether the server could not be reached at all."""
    return isinstance(error, ServiceUnavailableError) and error.status_code is None


def _was_not_sent(error: BaseException | None) -> bool:
    """Say whether a failure in an attempt came before its request."""
    is_ours = isinstance(error, InvalidRequestError | APIKeyError)
    return is_ours and getattr(error, "status_code", None) is None


def _may_move(error: DiPeOLLMError) -> bool:
    """Say whether the call goes on to another deployment after an error."""
    if isinstance(error, InvalidRequestError):
        return error.status_code is None  # this model cannot do what is asked
    return isinstance(error, CallError) and (
        _is_deployments_fault(error)
        or isinstance(error, ContextWindowError | RateLimitError)
    )
