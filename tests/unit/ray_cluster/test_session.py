"""Addresses of clusters, and what Ray says of them."""

import pytest
from ray.exceptions import AuthenticationError

from prioritycut_ray.errors import UserError
from prioritycut_ray.ray_cluster.session import explain_init_error, knock
from tests.hosts import free_port


def test_an_address_where_nothing_listens_is_reported_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=rf"{address}: no Ray cluster answers .*6379"):
        knock(address)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://10.0.0.1:10001", "Ray Client.*prioritycut submit"),
        ("http://10.0.0.1:8265", "dashboard; submit there"),
        ("10.0.0.1", "give HOST:PORT"),
        ("10.0.0.1:70000", "give HOST:PORT"),
        ("head:port", "give HOST:PORT"),
    ],
)
def test_an_address_that_is_not_one_of_a_head_says_what_to_give(address: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        knock(address)
    assert "TOKEN" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("auto", ConnectionError("Could not find any running Ray instance."), "unset it to start"),
        (None, SystemExit(15), "head of a Ray cluster"),
        (None, AuthenticationError("no token. Set it"), "rejected the authentication token.*TOKEN"),
        (None, Exception("The current node timed out during startup."), "within 30 s"),
    ],
)
def test_errors_of_ray_init_are_explained(
    address: str | None, error: BaseException, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        raise explain_init_error(address, error) or AssertionError("not explained")
    assert ("TOKEN" in str(caught.value)) == isinstance(error, AuthenticationError)


def test_a_rejected_token_may_be_the_cause_of_a_connection_error() -> None:
    error = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    text = "Traceback ...\nray.exceptions.AuthenticationError: RPC error: missing. Ensure that"
    error.__cause__ = RuntimeError(text)
    assert "token (RPC error: missing); " in str(explain_init_error("10.0.0.1:6379", error))


def test_a_bug_is_not_explained_away() -> None:
    assert explain_init_error(None, ValueError("an argument of ray.init")) is None
