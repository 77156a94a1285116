"""The configuration tree: precedence, messages, and the commands that show it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.config import BOUNDS, ConfigError, fields, load, to_toml
from penstock.core.types import OnMiss
from penstock.server.command import serve
from penstock.settings import Config
from tests.server.harness import penstock


def test_names_are_unique_and_documented() -> None:
    names = [name for _, name, _ in fields()]
    assert len(set(names)) == len(names)
    assert all(info.description for _, _, info in fields())


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text("[http]\nport = 1\nhost = '0.0.0.0'\n[engine]\nmax_batch = 3\n")
    environ = {"PENSTOCK_PORT": "2", "PENSTOCK_MAX_WAITING": "9", "PATH": "x"}
    config = load(file, environ, {"port": 3, "host": None})
    assert config.http.port == 3
    assert config.http.host == "0.0.0.0"  # noqa: S104 - nothing listens there
    assert config.engine.max_batch == 3
    assert config.admission.max_waiting == 9
    both = load(environ={"PENSTOCK_PARAMETERS": "reserve=0.05,window=40"})
    assert both.scheduler.parameters == {"reserve": 0.05, "window": 40}


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    config = load(
        flags={
            "parameters": {"a": 1, "b": 0.5},
            "port": 17,
            "prefix_cache": False,
            "host": 'a"b\\c\n',
            "drain_seconds": 0.25,
        },
        slo_classes=["inter active=ttft:0.5,on_miss:expire", "batch=e2e:60"],
    )
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load(file) == config


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"instances": 2, "place": "power-of-two"},
        {"prefill": 1, "decode": 1, "preset": "kairos", "kv_transport": "inline"},
        {"preset": "scls"},
        {"engine": "sim", "profile": "llama-2-7b/a100-80g"},
    ],
)
def test_what_is_printed_can_be_served(
    flags: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    # The absent model is what stops it, after everything else has been looked at.
    file.write_text(to_toml(load(flags={**flags, "model": str(tmp_path / "absent")})))
    assert serve(config=file) == 2
    said = capsys.readouterr().err
    assert "model" in said
    assert "absent" in said
    assert said.count("--") == 0


def test_keys_are_not_printed(tmp_path: Path) -> None:
    config = load(environ={"PENSTOCK_API_KEYS": "secret,other"})
    assert config.http.api_keys == ("secret", "other")
    printed = to_toml(config)
    assert "secret" not in printed
    assert "# api_keys = 2 of them, hidden" in printed
    file = tmp_path / "config.toml"
    file.write_text(printed)
    assert load(file).http.api_keys == (), "read back, no one key opens the server to others"


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel"])
def test_keys_that_no_header_can_carry_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="visible ASCII") as error:
        load(flags={"api_keys": ["good", key]})
    assert "--api-keys" in str(error.value)
    assert "good" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "[http]\napi_key = 'sk-1'\n",
        "[http]\napikeys = ['sk-1']\n",
        "[http]\napi_keys = 'sk-1'\n",
        "[http]\ntoken = 'sk-1'\n",
        "[slo]\nkey = 'sk-1'\n",
        "[slo.a]\napi_key = 'sk-1'\n",
    ],
)
def test_a_key_under_a_wrong_name_is_not_printed(tmp_path: Path, content: str) -> None:
    file = tmp_path / "p.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"p\.toml: \[(http|slo)\] ") as error:
        load(file)
    assert "sk-1" not in str(error.value)


def test_keys_and_parameters_of_the_environment() -> None:
    config = load(environ={"PENSTOCK_API_KEYS": "a, b,", "PENSTOCK_PARAMETERS": "reserve=0.2, "})
    assert config.http.api_keys == ("a", "b")
    assert config.scheduler.parameters == {"reserve": 0.2}
    with pytest.raises(ConfigError, match=r"PENSTOCK_PARAMETERS.*'reserve:0\.2'.*reserve=0\.05"):
        load(environ={"PENSTOCK_PARAMETERS": "reserve:0.2"})


def test_what_kubernetes_says_of_a_service_of_this_name_is_no_setting() -> None:
    address = "tcp://10.0.0.7:8000"
    environ = {
        "PENSTOCK_SERVICE_HOST": "10.0.0.7",
        "PENSTOCK_SERVICE_PORT": "8000",
        "PENSTOCK_SERVICE_PORT_HTTP": "8000",
        "PENSTOCK_PORT": address,
        "PENSTOCK_PORT_8000_TCP": address,
        "PENSTOCK_PORT_8000_TCP_PROTO": "tcp",
        "PENSTOCK_PORT_8000_TCP_PORT": "8000",
        "PENSTOCK_PORT_8000_TCP_ADDR": "10.0.0.7",
    }
    assert load(environ=environ) == Config()
    others = {key.replace("_", "_LLAMA_3_", 1): value for key, value in environ.items()}
    assert "PENSTOCK_LLAMA_3_PORT" in others
    assert load(environ=others) == Config()


def test_no_setting_is_taken_for_what_kubernetes_says() -> None:
    with pytest.raises(ConfigError, match="PENSTOCK_KV_TRANSPORT"):
        load(environ={"PENSTOCK_KV_TRANSPORT": "tcp://10.0.0.7:8000"})
    with pytest.raises(ConfigError, match="PENSTOCK_ROUTER_PORT"):
        load(environ={"PENSTOCK_ROUTER_PORT": "8000"})


def test_the_routers_key_is_no_setting_of_the_server() -> None:
    assert load(environ={"PENSTOCK_ROUTE_API_KEY": "key"}) == Config()


def test_parameters_on_the_command_line_keep_their_fractions() -> None:
    said = penstock("config", "--parameters.reserve", "0.05", "--parameters.window", "40")
    assert "parameters = {reserve = 0.05, window = 40}" in said.stdout, said
    wrong = penstock("config", "--parameters.reserve", "much")
    assert wrong.returncode == 2
    assert "--parameters" in wrong.stderr
    assert "'much'" in wrong.stderr


def test_slo_classes() -> None:
    config = load(slo_classes=["interactive=ttft:0.5,tpot:0.03,on_miss:expire"])
    chosen = config.slo["interactive"]
    assert (chosen.ttft, chosen.tpot, chosen.on_miss) == (0.5, 0.03, OnMiss.EXPIRE)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_bound_is_finite(tmp_path: Path, bound: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--slo-class a={bound}:{value} .*finite number"):
        load(slo_classes=[f"a={bound}:{value}"])
    file = tmp_path / "p.toml"
    file.write_text(f"[slo.a]\n{bound} = {value}\n")
    with pytest.raises(ConfigError, match=f"{bound}.*finite number"):
        load(file)


def test_the_drain_has_an_end() -> None:
    with pytest.raises(ConfigError, match=r"PENSTOCK_DRAIN_SECONDS: 'inf'.*finite number"):
        load(environ={"PENSTOCK_DRAIN_SECONDS": "inf"})


@pytest.mark.parametrize(
    "text", ["", "a", "a=", "=ttft:1", "a=ttft", "a=x:1", "a=ttft:1,ttft:2", "a=ttft:1,"]
)
def test_bad_slo_class_is_shown_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(slo_classes=[text])
    assert repr(text) in str(error.value)
    assert "on_miss:keep|demote|expire" in str(error.value)


def test_messages_name_source_value_and_rule(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text("[engine]\nblock_size = 0\n")
    cases = [
        ({"path": file}, [str(file), "block_size", "0", "greater than or equal to 1"]),
        ({"environ": {"PENSTOCK_PORT": "x"}}, ["PENSTOCK_PORT", "'x'", "integer"]),
        ({"flags": {"max_batch": -4}}, ["--max-batch", "-4", "greater than or equal to 1"]),
        ({"environ": {"PENSTOCK_PROT": "1"}}, ["PENSTOCK_PROT", "not a setting"]),
        ({"slo_classes": ["a=ttft:-1"]}, ["--slo-class a=ttft:-1", "'-1'", "greater than 0"]),
    ]
    for arguments, parts in cases:
        with pytest.raises(ConfigError) as error:
            load(**arguments)  # type: ignore[arg-type]
        for part in parts:
            assert part in str(error.value)


@pytest.mark.parametrize("content", ["[nope]\n", "x = 1\n", "[engine\n", "[engine]\ntypo = 1\n"])
def test_bad_files_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "p.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"p\.toml"):
        load(file)


def test_commands() -> None:
    import penstock as package

    assert penstock("version").stdout.strip() == package.__version__
    listed = penstock("presets").stdout
    for name in ("past-future", "vllm", "tgi", "oracle"):
        assert name in listed
    shown = penstock("config", "--port", "1234", "--slo-class", "a=ttft:1")
    assert "port = 1234" in shown.stdout
    assert "[slo.a]" in shown.stdout
    words = penstock("serve", "--help").stdout
    for _, name, _ in fields():
        assert "--" + name.replace("_", "-") in words


def test_bad_settings_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases: list[tuple[dict[str, object], str]] = [
            ({"port": port}, f"--port {port} is in use"),
            ({"port": 70000}, "--port: 70000"),
            ({"host": "no.such.host.invalid"}, "--host no.such.host.invalid"),
            ({"preset": "best"}, "known are"),
            ({"parameters": {"watermark": 0.5}}, "no parameter 'watermark'"),
            ({"preset": "vllm", "parameters": {"watermark": 7}}, "watermark"),
            ({"parameters": {"seed": 1}}, "'seed' is no parameter of a preset"),
            ({"max_batch": 100, "max_step_tokens": 50}, "--max-step-tokens 50"),
            ({"model": "absent-model"}, "absent-model"),
            ({"config": Path("absent.toml")}, "absent.toml"),
            ({"engine": "sim"}, "--engine sim needs --profile"),
            ({"engine": "sim", "profile": "no/such"}, "--profile no/such: "),
            ({"profile": "llama-2-7b/a100-80g"}, "only --engine sim has a profile"),
            ({"speed": 2.0}, "only --engine sim has a speed"),
            ({"speed": 0.0}, "--speed: 0.0"),
        ]
        for settings, part in cases:
            assert serve(**settings) == 2, settings  # type: ignore[arg-type]
            assert part in capsys.readouterr().err, settings


def test_bad_flag_on_the_command_line() -> None:
    result = penstock("serve", "--port", "x")
    assert result.returncode != 0
    assert "--port" in result.stderr + result.stdout


def test_engine_that_cannot_start_ends_the_server() -> None:
    result = penstock("serve", "--engine", "scripted", "--port", "0", "--kv-tokens", "4")
    assert result.returncode == 1
    assert "the engine cannot start: capabilities.kv_blocks is 0" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_is_quick_to_import() -> None:
    code = "import sys, penstock.cli; print({'torch', 'pydantic'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_defaults_are_valid() -> None:
    assert load() == Config()
