"""Secrets are taken out of whatever leaves the machine; what only resembles one stays."""

import pytest

from mmrlhf.redaction import redacted, redacted_values, without_credentials

KEYS = {
    "openai": "sk-proj-Abcdef0123456789Abcdef",
    "hub": "hf_AbcdefGhijklMnopqrStuv",
    "github": "ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "gitlab": "glpat-abcdefghij0123456789",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "google": "AIzaSyA-0123456789abcdefghijklmnopqrst",
    "token of three parts": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3.sig_nature",
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_is_taken_out_by_its_form_wherever_it_stands(kind):
    assert redacted(f'a line\n+    x = "{KEYS[kind]}"  # why') == 'a line\n+    x = "***"  # why'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://ann:p@ss:word@db:5432/x", "postgresql://***@db:5432/x"),
        ("https://token@github.com/a/b.git", "https://***@github.com/a/b.git"),
        ("password=hunterhunter&user=ann", "password=***&user=ann"),
        ('{"endpoint.key": "abcdefgh"}', '{"endpoint.key": "***"}'),
        ('{\\"token\\": \\"abcdefghi\\"}', '{\\"token\\": \\"***\\"}'),
        ("X_API_KEY: abcdef12", "X_API_KEY: ***"),
        ("token=1234567890123456 token=12e4567890ab", "token=*** token=***"),
        ("send Bearer abcdefghijklmnop now", "send Bearer *** now"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nrest", "***\nrest"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE cut", "***"),
    ],
)
def test_a_secret_is_taken_out_by_what_stands_before_it(text, expected):
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "def f(tokenizer: PreTrainedTokenizer, tokens: int = 128000) -> str:",
        '{"nll_per_token": 0.12345678901234567, "per_token": -1.25e-05, "by_key": 12345678}',
        "max_new_tokens: 512\ntoken: 1.25e-05\napi_key: null\nsecret: false",
        "rows.sort(key=lambda row: row.id, reverse=True)",
        "https://github.com/ann/repo/tree@v1 and ann@example.org",
        'api_key = os.environ["OPENAI_API_KEY"]',
        "sqlite:////home/a@b/mlflow.db",
        "w0.25-k1-seed0 | 0.5 | skip_connection",
    ],
)
def test_what_is_no_secret_stays(text, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert redacted(text) == text


def test_the_value_of_a_secret_variable_is_taken_out_in_every_spelling(monkeypatch, tmp_path):
    (tmp_path / "key.pem").write_text("x")
    monkeypatch.setenv("SOME_TOKEN", 'wal"rus and/more')
    monkeypatch.setenv("DBPASSWORD", 'wal"rus and/more-longer')
    monkeypatch.setenv("SHORT_KEY", "walrus")
    monkeypatch.setenv("TLS_KEY", str(tmp_path / "key.pem"))
    monkeypatch.setenv("TOKENIZERS_KIND", "parallelism")
    monkeypatch.setenv("HUGE_SECRET", "y" * 5000)
    told = 'a wal"rus and/more-longer wal\\"rus and/more wal%22rus%20and%2Fmore wal%22rus+and%2Fmore'
    assert redacted(told) == "a *** *** *** ***"
    assert redacted(f"walrus parallelism {tmp_path}/key.pem") == f"walrus parallelism {tmp_path}/key.pem"
    assert redacted("y" * 5000) == "***"


def test_values_under_the_name_of_a_secret_are_masked_whole_and_numbers_stay():
    told = {"endpoint": {"key": "abc", "api_key": 7, "url": "http://a:b@c"}, "tokens": 5, "key_env": "NAME"}
    told |= {"list": ["https://x:y@z", None, True], "auth": None, "my.password": ["a", "b"]}
    expected = {"endpoint": {"key": "***", "api_key": "***", "url": "http://***@c"}, "tokens": 5, "key_env": "NAME"}
    assert redacted_values(told) == expected | {
        "list": ["https://***@z", None, True],
        "auth": None,
        "my.password": "***",
    }


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://ann:s3cret@host:5000", "http://host:5000"),
        ("http://***@host:5000", "http://host:5000"),
        ("postgresql://ann:p@ss@db/x?sslpassword=y", "postgresql://db/x"),
        ("sqlite:////a@b/mlflow.db", "sqlite:////a@b/mlflow.db"),
    ],
)
def test_an_address_is_kept_without_user_and_password(uri, expected):
    assert without_credentials(uri) == expected
