"""Models on the command line: which endpoint and which key each of them gets, and its options."""

import asyncio

import pytest

from rlm.fake_server import FakeServer
from rlm.test_cli import TEXT, Command, done
from rlm_runtime.cli import models, values
from rlm_runtime.cli.arguments import parser
from rlm_runtime.errors import UsageError
from rlm_runtime.lms import PROVIDERS, register, resolve
from rlm_runtime.lms.base import Message
from rlm_runtime.lms.named import load_models
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.rlm import RLM

OPENAI, ANTHROPIC = "sk-openai-0123456789", "sk-ant-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (
        "OPENAI_BASE_URL",
        "ANTHROPIC_BASE_URL",
        "RLM_ROOT",
        "RLM_SUB",
        "RLM_PRICES",
        "RLM_MODELS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", OPENAI)
    monkeypatch.setenv("ANTHROPIC_API_KEY", ANTHROPIC)


@pytest.fixture
def servers():
    with FakeServer("ok") as one, FakeServer("ok") as two:
        yield one, two


def pair(*args):
    return models.pair(parser().parse_args(["ask", "q", *args]))


def url(lm):
    return lm.endpoint.base_url


def key(lm):
    """The key the model would send, as its endpoint holds it."""
    headers = lm.endpoint._headers
    return (
        headers.get("x-api-key") or headers.get("Authorization", "").removeprefix("Bearer ") or None
    )


X, Y = "http://127.0.0.1:7001/v1", "http://127.0.0.1:7002/v1"
HOME, CLAUDE = "https://api.openai.com/v1", "https://api.anthropic.com"


@pytest.mark.parametrize(
    ("args", "root", "sub"),
    [
        # the environment's key is the provider's own endpoint's ...
        (["--root", "openai:a"], (HOME, OPENAI), (HOME, OPENAI)),
        (["--root", "openai:a", "--sub", "anthropic:b"], (HOME, OPENAI), (CLAUDE, ANTHROPIC)),
        # ... or --base-url's, for the root and what shares its endpoint
        (["--root", "openai:a", "--base-url", X], (X, OPENAI), (X, OPENAI)),
        (["--root", "openai:a", "--sub", "openai:b", "--base-url", X], (X, OPENAI), (X, OPENAI)),
        # another endpoint gets no key
        (
            ["--root", "openai:a", "--sub", "openai:b", "--sub-base-url", Y],
            (HOME, OPENAI),
            (Y, None),
        ),
        (["--root", "openai:a", "--sub-base-url", Y], (HOME, OPENAI), (Y, None)),
        (
            ["--root", "openai:a", "--base-url", X, "--sub", "openai:b", "--sub-base-url", Y],
            (X, OPENAI),
            (Y, None),
        ),
        (
            ["--root", "openai:a", "--base-url", X, "--sub-base-url", X + "/"],
            (X, OPENAI),
            (X, OPENAI),
        ),
        # --base-url is the root's provider's only
        (
            ["--root", "openai:a", "--base-url", X, "--sub", "anthropic:b"],
            (X, OPENAI),
            (CLAUDE, ANTHROPIC),
        ),
        (
            ["--root", "anthropic:a", "--base-url", X, "--sub", "openai:b"],
            (X[:-3], ANTHROPIC),
            (HOME, OPENAI),
        ),
        (
            ["--root", "anthropic:a", "--sub", "openai:b", "--sub-base-url", Y],
            (CLAUDE, ANTHROPIC),
            (Y, None),
        ),
        (
            ["--root", "openai:a", "--sub", "anthropic:b", "--sub-base-url", Y],
            (HOME, OPENAI),
            (Y[:-3], None),
        ),
        # the provider's own endpoint claims the key before --base-url does
        (
            ["--root", "openai:a", "--base-url", X, "--sub", "openai:b", "--sub-base-url", HOME],
            (X, None),
            (HOME, OPENAI),
        ),
        # keys that are given
        (
            ["--root", "openai:a", "--base-url", X, "--root-opt", "api_key=mine-000"],
            (X, "mine-000"),
            (X, "mine-000"),
        ),
        (
            [
                "--root",
                "openai:a",
                "--sub",
                "openai:b",
                "--sub-base-url",
                Y,
                "--sub-opt",
                "api_key_env=OTHER",
            ],
            (HOME, OPENAI),
            (Y, "other-key"),
        ),
        (
            [
                "--root",
                "openai:a",
                "--root-opt",
                "api_key=mine-000",
                "--sub",
                "openai:b",
                "--sub-base-url",
                Y,
            ],
            (HOME, "mine-000"),
            (Y, None),
        ),
        (
            ["--root", "openai:a", "--root-opt", f"base_url={X}", "--sub", "openai:b"],
            (X, OPENAI),
            (X, OPENAI),
        ),
    ],
)
def test_a_key_goes_to_the_endpoint_it_was_given_for(args, root, sub, monkeypatch):
    monkeypatch.setenv("OTHER", "other-key")
    for lm, (where, wanted) in zip(pair(*args), (root, sub), strict=True):
        assert url(lm) == where and key(lm) == wanted


def test_a_url_of_the_environment_owns_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", X)
    root, sub = pair("--root", "openai:a", "--sub", "openai:b", "--sub-base-url", Y)
    assert (url(root), key(root), url(sub), key(sub)) == (X, OPENAI, Y, None)
    root, _ = pair("--root", "openai:a", "--base-url", Y)
    assert (url(root), key(root)) == (Y, None)


def test_no_key_of_the_root_reaches_the_sub_models_endpoint_in_a_run(servers, tmp_path):
    one, two = servers
    one._reply = done("llm_query('read this')")
    (tmp_path / "book.txt").write_text(TEXT)
    command = Command(tmp_path)
    args = [
        "--root",
        "openai:a",
        "--base-url",
        one.url,
        "--sub",
        "openai:b",
        "--sub-base-url",
        two.url,
    ]
    code, _, err = command(
        "ask", "what?", "-c", "book.txt", *args, "--root-opt", "headers.X-Tenant=secret-tenant"
    )
    assert code == 0, err
    assert one.requests[0].headers["authorization"] == "Bearer sk-test" and two.count == 1
    assert not {"authorization", "x-api-key", "x-tenant"} & two.requests[0].headers.keys()
    written = "".join(p.read_text() for p in tmp_path.rglob("events.jsonl"))
    assert written and "sk-test" not in written and "secret-tenant" not in written


def test_options_of_each_model_reach_its_requests(servers):
    one, two = servers
    root, sub = pair(
        "--root",
        "openai:a",
        "--base-url",
        one.url,
        "--sub",
        "openai:b",
        "--sub-base-url",
        two.url,
        "--root-opt",
        "temperature=0.2",
        "--root-opt",
        "reasoning_effort=low",
        "--root-opt",
        "max_tokens=8k",
        "--root-opt",
        "query.api-version=2024-10-21",
        "--root-opt",
        "stream=false",
        "--sub-opt",
        "extra_body.top_k=20",
        "--sub-opt",
        'headers={"X-A": "b"}',
        "--sub-opt",
        "extra_body.mode=fast",
        "--sub-opt",
        "max-retries=1",
    )
    for lm in (root, sub):
        asyncio.run(lm.complete([Message(role="user", content="x")]))
    first, second = one.requests[0], two.requests[0]
    assert {
        "temperature": 0.2,
        "reasoning_effort": "low",
        "max_tokens": 8000,
    }.items() <= first.body.items()
    assert first.path.endswith("?api-version=2024-10-21") and "stream" not in first.body
    assert (
        second.body["top_k"] == 20
        and second.body["mode"] == "fast"
        and second.headers["x-a"] == "b"
    )
    assert (
        "temperature" not in second.body
        and "?" not in second.path
        and sub.endpoint.max_retries == 1
    )


@pytest.mark.parametrize(
    ("pair_", "words"),
    [
        ("temperature", "NAME=VALUE"),
        ("tempratur=1", "Did you mean temperature"),
        ("=3", "NAME=VALUE"),
        ("window.x=3", "headers.NAME"),
        ("headers=3", "JSON object"),
        ("api_key_env=NO_SUCH", "NO_SUCH"),
        ("reasoning_effort=hard", "minimal"),
        ("price=1", "IN,OUT"),
    ],
)
def test_an_option_that_cannot_be_says_what_can(pair_, words):
    with pytest.raises(UsageError, match=words):
        pair("--root", "openai:a", "--root-opt", pair_)
    with pytest.raises(UsageError) as e:
        values.model_options(["api.key.x=secret-value-1"], "--root-opt")
    assert "secret-value-1" not in str(e.value)


# A file of models


FILE = f"""
[big]
model = "openai:gpt-x"
base_url = "{X}"
api_key_env = "BIG_KEY"
temperature = 0.2
query = {{ "api-version" = "2024-10-21" }}
price = [1.0, 2.0]

[small]
model = "openai:gpt-y"

[mine]
class = "rlm_runtime.lms.scripted:ScriptedLM"
script = ["hello"]
"""


def test_models_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "models.toml"
    path.write_text(FILE)
    monkeypatch.setenv("BIG_KEY", "big-key-1234")
    root, sub = pair("--models", str(path), "--root", "big", "--sub", "small")
    assert (url(root), key(root), root.model) == (X, "big-key-1234", "gpt-x")
    assert (url(sub), key(sub)) == (HOME, OPENAI) and root.price(1_000_000, 0) == 1.0
    root, sub = pair("--models", str(path), "--root", "big")
    assert sub is root
    monkeypatch.setenv("RLM_MODELS", str(path))
    root, sub = pair(
        "--root", "big", "--base-url", Y, "--sub", "mine"
    )  # another endpoint: the entry's key stays behind
    assert (
        (url(root), key(root)) == (Y, None)
        and isinstance(sub, ScriptedLM)
        and not root.endpoint._query
    )
    root, sub = pair("--root", "big", "--sub-base-url", Y)
    assert (key(root), url(sub), key(sub)) == ("big-key-1234", Y, None)
    found = load_models(path)
    assert set(found) == {"big", "small", "mine"} and RLM(found["mine"]).completion  # in Python
    with pytest.raises(UsageError, match="big, small, mine"):
        pair("--root", "bgi")
    with pytest.raises(UsageError, match="big, small, mine"):
        load_models(path, ["bgi"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a", "not TOML"),
        ("[a]\nx = 1", "needs model"),
        ('["a:b"]\nmodel = "openai:m"', "no colon"),
        ('[a]\nmodel = "openai:m"\nclass = "x:y"', "both"),
        ('[a]\nmodel = "openai:m"\ntempratur = 1', "temperature"),
        ('[a]\nclass = "no_such_module:x"', "no_such_module"),
        ("a = 1", "needs model"),
    ],
)
def test_a_file_that_cannot_be(tmp_path, text, words):
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        load_models(path)
    with pytest.raises(UsageError, match="No such file"):
        load_models(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="named with --root"):  # --model is short for --models
        pair("--model", "openai:m", "--root", "openai:m")


# Prices


def test_an_unknown_price_names_the_option(tmp_path):
    with pytest.raises(UsageError, match=r"--price IN,OUT.*price="):
        RLM(resolve("openai:unheard-of"), budget={"usd": 1.0})
    (tmp_path / "book.txt").write_text(TEXT)
    with FakeServer(done("'x'")) as server:
        args = ["what?", "-c", "book.txt", "--root", "openai:unheard-of", "--base-url", server.url]
        assert "cost unknown (--price IN,OUT)" in Command(tmp_path)("ask", *args)[2]
        assert "$0.0" in Command(tmp_path)("ask", *args, "--price", "1,2")[2]


# A provider in one file (the recipe of docs/lms.md)


def test_a_new_provider_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "acme_lm.py").write_text(
        "from rlm_runtime.lms import register\n"
        "from rlm_runtime.lms.openai import OpenAILM\n\n\n"
        '@register("acme")\n'
        "class AcmeLM(OpenAILM):\n"
        '    provider = "acme"\n'
        '    official = "https://api.acme.example/v1"\n'
        '    key_variable, url_variable = "ACME_API_KEY", "ACME_BASE_URL"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("rlm_runtime.lms.PROVIDERS", dict(PROVIDERS))
    import acme_lm

    with FakeServer("hello") as server:
        monkeypatch.setenv("ACME_API_KEY", "acme-key-123")
        monkeypatch.setenv("ACME_BASE_URL", server.url)
        lm = resolve("acme:m", temperature=0.5)
        assert isinstance(lm, acme_lm.AcmeLM) and lm.name == "acme:m"
        assert asyncio.run(lm.complete([Message(role="user", content="x")])).text == "hello"
        assert server.requests[0].headers["authorization"] == "Bearer acme-key-123"
        assert server.requests[0].body["temperature"] == 0.5
    with pytest.raises(UsageError, match="Did you mean temperature"):
        resolve("acme:m", tempratur=1)
    with pytest.raises(UsageError, match="acme:MODEL"):
        resolve("acmee:m")
    with pytest.raises(UsageError, match="already"):
        register("openai")(acme_lm.AcmeLM)
    with pytest.raises(UsageError, match="colon"):
        register("a:b")


def test_a_provider_of_an_installed_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "beta_lm.py").write_text(
        "from rlm_runtime.lms.scripted import ScriptedLM\n\n\n"
        "def beta(model, *, temperature=None):\n"
        "    return ScriptedLM([f'{model} at {temperature}'], name=f'beta:{model}')\n"
    )
    (tmp_path / "beta_lm-1.0.dist-info").mkdir()
    (tmp_path / "beta_lm-1.0.dist-info" / "METADATA").write_text("Name: beta-lm\nVersion: 1.0\n")
    entry = "[rlm_runtime.lms]\nbeta = beta_lm:beta\n"
    (tmp_path / "beta_lm-1.0.dist-info" / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("rlm_runtime.lms.PROVIDERS", dict(PROVIDERS))
    root, sub = pair("--root", "beta:m", "--root-opt", "temperature=0.5")
    assert root is sub and root.name == "beta:m"
    said = asyncio.run(root.complete([Message(role="user", content="x")])).text
    assert said == "m at 0.5"
    with pytest.raises(UsageError, match="It takes temperature"):
        resolve("beta:m", zzz=1)
