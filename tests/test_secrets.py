"""What counts as a secret, and what does not: the log is read by people, and a commit or a checksum in it is no key."""

import json

import pytest

from bigtrain import configfile, secrets
from bigtrain.errors import UserError
from bigtrain.secrets import redact, redacted

SHAPES = {
    "API key": "sk-proj-abcdefgh12345678901",
    "Hugging Face token": "hf_" + "aBcD" * 8,
    "GitHub token": "ghp_" + "a1B2" * 9,
    "AWS access key": "AKIAIOSFODNN7EXAMPLE",
    "Slack token": "xoxb-123456789012-abcdef",
    "Google API key": "AIza" + "x" * 35,
    "JSON Web Token": "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJ",
    "wandb key": "0123456789abcdef" * 2 + "01234567",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIE+/=\n-----END RSA PRIVATE KEY-----",
    "bearer token": "Bearer abcdefghijklmnopqrstuvwxyz==",
}


@pytest.fixture
def environment(monkeypatch):
    """Set variables as a new process would find them."""

    def set_(**variables):
        secrets._secrets.cache_clear()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield set_
    monkeypatch.undo()
    secrets._secrets.cache_clear()


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("around", ["{}", "key={}, more", "('{}')", 'x "{}"\n', "tab\t{}\r\n"])
def test_what_looks_like_a_key(kind, around):
    text = around.format(SHAPES[kind])
    assert redact(text) == around.format(f"[redacted: {kind}]") and secrets.kinds(text) == [kind]


def test_a_password_in_a_url():
    assert (
        redact("git clone https://me:pa55@host/x and ssh://h/x:1@y")
        == "git clone https://[redacted: password in a URL]@host/x and ssh://h/x:1@y"
    )


def test_a_key_that_never_ends_is_hidden_to_the_end():
    assert redact("a -----BEGIN PRIVATE KEY-----\nMIIE") == "a [redacted: private key]"


@pytest.mark.parametrize(
    "text",
    [
        "risk-neutral-ask-me-12345678901234567",
        "sk-learn-is-a-library-of-python",
        "hf_attention_implementation",
        "a" * 64,
        "~/.cache/huggingface/hub/models--gpt2/snapshots/" + "607a30d7" * 5 + "/tokenizer.json",
        "step 12  loss 0.1234567890123456789012345678901234567890",
        "http://localhost:6006/#scalars see a@b",
        "the bearer of this letter",
        "-----BEGIN CERTIFICATE-----",
    ],
)
def test_ordinary_text_stays(text):
    assert redact(text) == text


def test_the_environment(environment, tmp_path):
    (tmp_path / "key.pem").touch()
    environment(
        MY_API_KEY='with "quotes" \\ and é', SHORT_TOKEN="1234567", DB_PASSWORD_MAIN="hunter2hunter2", LONG_TOKEN="hunter2hunter2-more",
        TLS_KEY=str(tmp_path / "key.pem"), KEYBOARD="international",
    )  # fmt: skip
    assert redact("a hunter2hunter2-more b") == "a [redacted: LONG_TOKEN] b"
    assert redact("xhunter2hunter2y") == "x[redacted: DB_PASSWORD_MAIN]y"
    ordinary = f"1234567 {tmp_path}/key.pem international"
    assert redact(ordinary) == ordinary
    row = {"step": 1, "prompt": 'see with "quotes" \\ and é', "nested": [{"a": ("hunter2hunter2",)}], "loss": 0.5, "none": None}
    assert json.loads(json.dumps(redacted(row))) == {
        "step": 1, "prompt": "see [redacted: MY_API_KEY]", "nested": [{"a": ["[redacted: DB_PASSWORD_MAIN]"]}], "loss": 0.5, "none": None,
    }  # fmt: skip


def test_a_config_with_a_secret_is_refused(environment, tmp_path):
    environment(SERVICE_TOKEN="correct \\horse")
    (tmp_path / "c.yaml").write_text(
        "model: {layers: 1, width: 8, heads: 1, mlp_width: 8, max_positions: 8}\n"
        f"data: {{sequence_length: 8, path: 'https://me:pa55w@h/x', source: text}}\ntrain: {{steps: 1, global_batch: 1, micro_batch: 1}}\n"
        f"optimizer: {{lr: 1}}\ngenerate:\n  prompts: [say correct \\horse, {SHAPES['Hugging Face token']}]\n"
    )
    with pytest.raises(UserError) as error:
        configfile.load(tmp_path / "c.yaml")
    message = str(error.value)
    assert "c.yaml:2: data.path: holds a secret (password in a URL), and is copied into the run's folder; take it out" in message
    assert "c.yaml:6: generate.prompts: holds a secret (SERVICE_TOKEN)" in message and "keep secrets in the environment" in message
    assert "horse" not in message and "pa55w" not in message and "hf_" not in message
