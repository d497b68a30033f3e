"""The errors: their family tree, what they carry, and what survives a pickle."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from dipeo_llm import errors
from dipeo_llm.adapters.factory import by_name, create_adapter, resolve, unknown_model
from dipeo_llm.errors import (
    APIKeyError,
    APIKeyNotFoundError,
    CallError,
    ContentFilterError,
    ContextWindowError,
    DiPeOLLMError,
    InvalidRequestError,
    LLMServiceError,
    LLMTimeoutError,
    ModelNotFoundError,
    QuotaExceededError,
    RateLimitError,
    ServiceUnavailableError,
    SettingsError,
    StreamInterruptedError,
    StructuredOutputError,
)
from dipeo_llm.keys import EnvironmentAPIKeys, StaticAPIKeys
from dipeo_llm.settings import Settings

PARENTS: dict[type[DiPeOLLMError], type[DiPeOLLMError]] = {
    SettingsError: DiPeOLLMError,
    CallError: DiPeOLLMError,
    APIKeyError: CallError,
    APIKeyNotFoundError: APIKeyError,
    LLMServiceError: CallError,
    InvalidRequestError: LLMServiceError,
    ContextWindowError: LLMServiceError,
    ContentFilterError: LLMServiceError,
    ModelNotFoundError: LLMServiceError,
    RateLimitError: LLMServiceError,
    QuotaExceededError: RateLimitError,
    ServiceUnavailableError: LLMServiceError,
    LLMTimeoutError: LLMServiceError,
    StreamInterruptedError: LLMServiceError,
    StructuredOutputError: LLMServiceError,
}
CALL_ERRORS = [cls for cls in PARENTS if issubclass(cls, CallError)]
RETRYABLE = {RateLimitError, ServiceUnavailableError, LLMTimeoutError}
FIELDS: dict[str, Any] = {
    "service": "openai",
    "model": "gpt-4.1-nano",
    "status_code": 429,
    "retry_after": 1.5,
    "retryable": True,
    "request_id": "req_1",
    "attempts": 3,
    "details": {"code": "rate_limit_exceeded"},
}
EXTRA: dict[type[DiPeOLLMError], dict[str, Any]] = {
    StreamInterruptedError: {"partial_text": "Once upon"},
    StructuredOutputError: {"reason": "refusal", "text": "I would rather not."},
}


class TenantError(LLMServiceError):
    """An application's own error, with an argument of its own in front."""

    def __init__(self, tenant: str) -> None:
        super().__init__(f"tenant {tenant!r} may not", service="openai", attempts=1)
        self.tenant = tenant


def full(cls: Any) -> Any:
    """Make an error of a class with every field set."""
    return cls("it failed", **FIELDS, **EXTRA.get(cls, {}))


@pytest.mark.parametrize(("cls", "parent"), PARENTS.items())
def test_each_class_hangs_where_the_tree_says(
    cls: type[DiPeOLLMError], parent: type[DiPeOLLMError]
) -> None:
    """Catching a branch of the tree catches all that hangs on it."""
    above = [base for base in cls.__mro__[1:] if base in {*PARENTS, DiPeOLLMError}]

    assert above[0] is parent


def test_the_tree_is_whole() -> None:
    """No public error hides beside the documented tree."""
    public = {
        value
        for name, value in vars(errors).items()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and not name.startswith("_")
    }

    assert public == {*PARENTS, DiPeOLLMError}


def test_the_docstring_draws_every_class() -> None:
    """The tree in the module's docstring names each class that there is."""
    missing = [c.__name__ for c in PARENTS if c.__name__ not in (errors.__doc__ or "")]

    assert missing == []


def test_a_bad_setting_is_a_value_error_too() -> None:
    """Code that knows nothing of this package catches a bad setting as a ValueError."""
    assert issubclass(SettingsError, ValueError)


def test_a_bad_key_is_not_a_failure_of_the_service() -> None:
    """Catching LLMServiceError, to try elsewhere, does not swallow a bad key."""
    assert not issubclass(APIKeyError, LLMServiceError)


@pytest.mark.parametrize("cls", CALL_ERRORS)
def test_only_what_may_pass_by_itself_is_retryable(cls: Any) -> None:
    """The class alone says whether the same call may succeed later."""
    assert cls("x").retryable is (cls in RETRYABLE)


@pytest.mark.parametrize("cls", CALL_ERRORS)
@pytest.mark.parametrize("retryable", [True, False])
def test_one_failure_may_know_better_than_its_class(cls: Any, retryable: bool) -> None:
    """Whoever raises an error can say that this one is, or is not, worth a retry."""
    assert cls("x", retryable=retryable).retryable is retryable


@pytest.mark.parametrize("cls", CALL_ERRORS)
def test_what_is_not_known_is_none(cls: Any) -> None:
    """An error that knows only its message has every other field all the same."""
    error = cls("it failed")

    assert {name: getattr(error, name) for name in FIELDS} == {
        "service": None,
        "model": None,
        "status_code": None,
        "retry_after": None,
        "retryable": cls in RETRYABLE,
        "request_id": None,
        "attempts": 0,
        "details": {},
    }
    assert str(error) == error.message == "it failed"


@pytest.mark.parametrize("cls", CALL_ERRORS)
def test_fields_are_kept(cls: Any) -> None:
    """What an error is told, it says."""
    error = full(cls)
    expected = {**FIELDS, **EXTRA.get(cls, {})}

    assert {name: getattr(error, name) for name in expected} == expected


def test_errors_do_not_share_their_details() -> None:
    """A detail added to one error does not appear on the next."""
    first, second = LLMServiceError("a"), LLMServiceError("b")

    first.details["code"] = "x"

    assert second.details == {}


@pytest.mark.parametrize("cls", CALL_ERRORS)
def test_a_field_that_does_not_exist_is_refused(cls: Any) -> None:
    """A misspelt field is a TypeError, not a field that is silently lost."""
    with pytest.raises(TypeError, match="statuscode"):
        cls("x", statuscode=500)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", CALL_ERRORS)
def test_an_error_survives_a_pickle(cls: Any, protocol: int) -> None:
    """An error that crosses a process boundary loses none of its fields."""
    error = full(cls)
    error.add_note("while feeding the cat")

    again = pickle.loads(pickle.dumps(error, protocol))

    assert type(again) is cls
    assert (again.args, vars(again)) == (error.args, vars(error))
    assert str(again) == "it failed"


@pytest.mark.parametrize(
    "error", [SettingsError("X='y' cannot be read"), TenantError("a")]
)
def test_errors_with_other_constructors_survive_a_pickle(error: DiPeOLLMError) -> None:
    """A subclass may have any constructor of its own and still crosses processes."""
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.parametrize("cls", CALL_ERRORS)
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_an_error_can_be_copied(cls: Any, duplicate: Callable[[Any], Any]) -> None:
    """A copy is an equal error of the same class."""
    error = full(cls)

    again = duplicate(error)

    assert type(again) is cls
    assert again is not error
    assert (str(again), vars(again)) == (str(error), vars(error))


PROVOKED: dict[str, Callable[[], Any]] = {
    "no model": lambda: resolve("\n"),
    "no service": lambda: by_name("open\nai"),
    "no provider": lambda: _raise(unknown_model("no\nsuch")),
    "no key": lambda: create_adapter("openai", "gpt\n4", ""),
    "no variable": lambda: EnvironmentAPIKeys().get_api_key("my\nkey"),
    "no id": lambda: StaticAPIKeys({"a": "sk-1"}).get_api_key("my\nkey"),
    "no number": lambda: Settings.from_env({"DIPEO_LLM_TIMEOUT": "1\n2"}),
    "no URL": lambda: Settings.from_env({"DIPEO_LLM_OPENAI_BASE_URL": "x\ny"}),
}


@pytest.mark.parametrize("what", PROVOKED)
def test_a_message_is_one_line_whatever_was_given(what: str) -> None:
    """No line break in a name or a value breaks a log in two."""
    with pytest.raises(DiPeOLLMError) as caught:
        PROVOKED[what]()

    assert str(caught.value).isprintable()


def _raise(error: Exception) -> None:
    raise error
