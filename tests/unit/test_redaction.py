"""No secret survives in a message, whatever stands around it and however a library writes it."""

from __future__ import annotations

import json
import string
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.redaction import HIDDEN, SHORTEST, credentials_in, redact, secrets_in

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_SESSION_TOKEN", True),
        ("HF_TOKEN", True),
        ("RAY_AUTH_TOKEN", True),
        ("TOKEN", True),
        ("my_api_key", True),
        ("CLIENT_SECRET", True),
        ("DB_PASSWORD", True),
        ("PASSWORD_OF_DB", True),
        ("SSH_PASSPHRASE", True),
        ("HOME", False),
        ("KEYBOARD", False),
        ("MONKEY", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", False),
        ("AWS_REGION", False),
    ],
)
def test_a_variable_is_secret_by_its_name(name, secret):
    assert (name in secrets_in({name: "x" * SHORTEST})) is secret


@pytest.mark.parametrize("value", ["", "short", "   1234567   "], ids=["empty", "short", "short-in-space"])
def test_short_values_are_words(value):
    assert secrets_in({"HF_TOKEN": value}) == {}


@pytest.mark.parametrize(
    "written",
    [
        pytest.param(SECRET, id="bare"),
        pytest.param(quote(SECRET), id="in-a-path"),
        pytest.param(quote(SECRET, safe=""), id="in-a-query"),
        pytest.param(json.dumps({"key": SECRET}), id="json"),
        pytest.param(repr({"key": SECRET}), id="repr"),
    ],
)
def test_a_value_of_the_environment_is_hidden(written):
    shown = redact(f"403 for {written}: denied", {"AWS_SECRET_ACCESS_KEY": SECRET})
    assert HIDDEN in shown
    assert SECRET not in shown
    assert quote(SECRET, safe="") not in shown
    assert shown.startswith("403 for ")
    assert shown.endswith(": denied")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("https://me:pass@host/x", "https://***@host/x", id="user-and-password"),
        pytest.param("https://me:p@ss@host/x", "https://***@host/x", id="at-in-password"),
        pytest.param("s3:/me:pass@bucket/x", "s3:/***@bucket/x", id="slash-lost-in-a-path"),
        pytest.param("see http://a:1/ and b@c", "see http://a:1/ and b@c", id="port-and-mail"),
        pytest.param("http://head:8265/x", "http://head:8265/x", id="port"),
        pytest.param("https://hf_0123456789abcdefghij@host/x", "https://***@host/x", id="token-as-user"),
        pytest.param("git+ssh://git@host/x", "git+ssh://git@host/x", id="user-alone"),
        pytest.param("https://b/o?X-Amz-Signature=abc&y=1", "https://b/o?X-Amz-Signature=***&y=1", id="aws"),
        pytest.param("https://b/o?a=1&Signature=ab%2Fc", "https://b/o?a=1&Signature=***", id="google"),
        pytest.param("https://b/o?sv=1&sig=a%3D", "https://b/o?sv=1&sig=***", id="azure"),
        pytest.param("https://b/o?token=abc#top", "https://b/o?token=***#top", id="token"),
        pytest.param("'https://b/o?sig=abc'", "'https://b/o?sig=***'", id="quoted"),
        pytest.param("design=3&signal=4", "design=3&signal=4", id="words"),
    ],
)
def test_a_url_loses_its_secrets(text, shown):
    assert redact(text, {}) == shown
    assert (credentials_in(text, {}) is None) is (text == shown or "token-as-user" in text)


def test_secrets_that_overlap_leave_nothing():
    environment = {"A_TOKEN": "abcdefgh", "B_TOKEN": "defghijk"}
    assert redact("x abcdefghijk y", environment) == "x *** y"


def test_a_secret_inside_another_leaves_nothing():
    environment = {"A_TOKEN": "abcdefgh", "B_TOKEN": "0abcdefgh9"}
    assert redact("0abcdefgh9 abcdefgh", environment) == "*** ***"


def test_a_key_of_several_lines_is_hidden_on_one_line():
    key = "-----BEGIN KEY-----\nMIIabc\n-----END KEY-----"
    assert redact(f"bad key: {' '.join(key.split())}.", {"SSH_KEY": key}) == "bad key: ***."


CHARACTERS = string.ascii_letters + string.digits + "/+=-_.*:@?&% \"'\\\n"
SECRETS = st.lists(
    st.text(CHARACTERS, min_size=SHORTEST, max_size=14).filter(lambda s: len(s.strip()) >= SHORTEST), max_size=4
)
PIECES = st.lists(st.text(CHARACTERS, max_size=12), min_size=1, max_size=6)


@settings(max_examples=1000)
@given(SECRETS, PIECES, st.randoms(use_true_random=False))
@example(["***-----"], ["password", "-----"], None)
@example(["password", "***-----"], ["password-----"], None)
def test_no_secret_survives(secrets, pieces, random):
    environment = {f"S{i}_TOKEN": secret for i, secret in enumerate(secrets)}
    parts = [*pieces, *secrets, *secrets]
    if random is not None:
        random.shuffle(parts)
    text = "".join(parts)
    shown = redact(text, environment)
    assert all(secret.strip() not in shown for secret in secrets)
    assert redact(shown, environment) == shown


@given(st.text(CHARACTERS.replace("\n", ""), max_size=60))
def test_text_without_secrets_is_as_it_was(text):
    if "/" not in text and "=" not in text:
        assert redact(text, {"A_TOKEN": "\x00" * SHORTEST}) == text


class TestCredentials:
    def test_what_is_found_is_said_without_it(self):
        found = credentials_in(f"x{SECRET}y", {"AWS_SECRET_ACCESS_KEY": SECRET})
        assert found == "the value of the environment variable AWS_SECRET_ACCESS_KEY"

    @pytest.mark.parametrize("text", ["embedded:maze", "owner/name", "A red ball: 3 @ 4", "/home/me/model", ""])
    def test_settings_are_no_credentials(self, text):
        assert credentials_in(text, {"AWS_SECRET_ACCESS_KEY": SECRET}) is None

    def test_the_environment_is_that_of_the_process(self, monkeypatch):
        monkeypatch.setenv("SOME_API_KEY", SECRET)
        assert redact(f"<{SECRET}>") == "<***>"
        assert credentials_in(SECRET) == "the value of the environment variable SOME_API_KEY"
