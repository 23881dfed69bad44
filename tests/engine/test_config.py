"""The configuration: every refusal names the key and what would be possible."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import config as configuration
from engine.config import Address, Config, ConfigError, cores, decode, describe, encode, load, parse_address, value_of


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "slotkeeper.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path: Path, text: str, **overrides: Any) -> list[str]:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, {key.replace("__", "."): value for key, value in overrides.items()})
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


def test_without_a_file_the_defaults_hold() -> None:
    config = load(None)
    assert config == Config()
    assert config.server.api_processes == cores()
    assert config.address == Address("127.0.0.1", 7411)
    assert config.api.deadline_ms == 1_000


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, '[server]\nlisten = "127.0.0.2:80"\napi_processes = 3\n[log]\nlevel = "debug"\n')
    config = load(path, {"server.listen": "[::1]:0", "server.api_processes": None})
    assert config.server.listen == "[::1]:0"
    assert config.server.api_processes == 3, "None on the command line means that it was not given"
    assert config.log.level == "debug"
    assert config.api == Config().api


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[api]\ndeadlin_ms = 5", "api.deadlin_ms: unknown key; did you mean api.deadline_ms?"),
        ("[api]\nqueue_ms_max = 5", "api.queue_ms_max: unknown key; did you mean overload.queue_ms_max?"),
        ("[apii]\ndeadline_ms = 50", "apii.deadline_ms: unknown key; did you mean api.deadline_ms?"),
        ("deadline_ms = 50", "deadline_ms: unknown key; did you mean api.deadline_ms?"),
        ("[jornal]", "jornal: unknown section; did you mean journal?"),
        (
            "[api.deadline_ms]\nx = 1",
            "api.deadline_ms: {'x': 1} is not possible; it is an integer, allowed: 10 to 60000",
        ),
        ("xyzzy = 50", "xyzzy: unknown key; `slotkeeper config check --print` lists all keys"),
        ("api = 50", "api: is a section, written [api], not a value"),
        ("[api]\ndeadline_ms = 9", "api.deadline_ms: 9 is not possible; it is an integer, allowed: 10 to 60000"),
        (
            "[api]\ndeadline_ms = 60001",
            "api.deadline_ms: 60001 is not possible; it is an integer, allowed: 10 to 60000",
        ),
        (
            '[api]\ndeadline_ms = "1s"',
            'api.deadline_ms: "1s" is not possible; it is an integer, allowed: 10 to 60000',
        ),
        ("[api]\ndeadline_ms = true", "api.deadline_ms: true is not possible; it is an integer, allowed: 10 to 60000"),
        ("[api]\ndeadline_ms = 10.5", "api.deadline_ms: 10.5 is not possible; it is an integer, allowed: 10 to 60000"),
        (
            "[api]\naccess_log_sample = nan",
            "api.access_log_sample: nan is not possible; it is a number, allowed: 0.0 to 1.0",
        ),
        (
            "[server]\nallow_unauthenticated = 1",
            "server.allow_unauthenticated: 1 is not possible; it is a boolean, allowed: true, false",
        ),
        (
            '[log]\nlevel = "loud"',
            'log.level: "loud" is not possible; it is a string, allowed: "debug", "info", "warning", "error"',
        ),
        ("[runtime]\ndirectory = 5", "runtime.directory: 5 is not possible; it is a string"),
    ],
)
def test_refuses_with_the_path_of_the_key(tmp_path: Path, text: str, problem: str) -> None:
    assert problems(tmp_path, text) == [problem]


@pytest.mark.parametrize(
    ("text", "opening"),
    [
        ("[api]\ndeadline_ms = 250", "overload.queue_ms_max: 250 must be lower than api.deadline_ms (250)"),
        ("[reservations]\nttl_seconds_max = 172801", "reservations.hold_seconds_max: 172800 must be at least reserv"),
        ("[journal]\nsegment_mb = 3", "journal.checkpoint_mb: 4 must be at most journal.segment_mb (3)"),
        ("[api]\nbody_bytes_max = 4096", "api.body_bytes_max: 4096 must be at least 5888, for a reservation of"),
        ('[runtime]\ndirectory = "run"', 'runtime.directory: "run" must be an absolute path'),
        ('[server]\nlisten = "shop.example:80"', "server.listen: 'shop.example' is neither an IP address nor localh"),
    ],
)
def test_refuses_settings_that_contradict_each_other(tmp_path: Path, text: str, opening: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.startswith(opening)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "[::]", "[2001:db8::1]"])
def test_other_hosts_are_served_only_on_demand(tmp_path: Path, host: str) -> None:
    (problem,) = problems(tmp_path, f'[server]\nlisten = "{host}:7411"')
    assert problem.startswith(f"server.listen: {host}:7411 can be reached from other hosts")
    assert "no API keys (they come with a later one)" in problem
    assert "server.allow_unauthenticated = true" in problem
    allowed = load(written(tmp_path, f'[server]\nlisten = "{host}:7411"\nallow_unauthenticated = true'))
    assert str(allowed.address) == f"{host}:7411"


def test_all_problems_are_told_at_once_with_their_source(tmp_path: Path) -> None:
    path = written(tmp_path, "[api]\ndeadline_ms = 1\nbody = 2\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {"server.api_processes": 0, "server.lisen": "x"})
    assert [problem.partition(" is not")[0].partition(" unknown")[0] for problem in caught.value.problems] == [
        f"{path}: api.deadline_ms: 1",
        f"{path}: api.body:",
        "command line: server.api_processes: 0",
        "command line: server.lisen:",
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"[api\n", "not valid TOML"), (b"\xff", "not valid TOML"), (None, "cannot be read: No such file")],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, text: str) -> None:
    path = tmp_path / "slotkeeper.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        load(path)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
        ("localhost:80", Address("127.0.0.1", 80)),
        ("[::1]:65535", Address("::1", 65_535)),
        ("[0:0:0:0:0:0:0:1]:1", Address("::1", 1)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7411",
        ":7411",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:x",
        "127.0.0.1:²",
        "::1:80",
        "[127.0.0.1]:80",
        "[::1]",
        "[localhost]:80",
        "127.1:80",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|not a port|neither an IP|in brackets"):
        parse_address(text)


def test_the_effective_configuration_survives_its_file(tmp_path: Path) -> None:
    config = load(written(tmp_path, "[api]\naccess_log_sample = 1\n"), {"runtime.directory": "/run/x"})
    assert decode(encode(config)) == config


@pytest.mark.parametrize("document", [b"{", b'{"api":{"deadline":1}}', b'{"api":{"deadline_ms":1}}'])
def test_a_changed_effective_configuration_is_refused(document: bytes) -> None:
    with pytest.raises(ConfigError, match="not what this version writes"):
        decode(document)


def test_describe_has_every_key_with_a_meaning() -> None:
    settings = {setting.key: setting for setting in describe()}
    config = Config()
    sections = msgspec.structs.asdict(config)
    assert list(settings) == [
        f"{name}.{field}" for name, section in sections.items() for field in section.__struct_fields__
    ]
    for setting in settings.values():
        assert setting.meaning, setting.key
        assert setting.range, setting.key
        value_of(config, setting.key)
    assert settings["api.deadline_ms"][1:4] == ("integer", "1000", "10 to 60000")
    assert settings["server.api_processes"].default == "number of cores"
    assert settings["log.format"][1:4] == ("string", '"auto"', '"auto", "json", "console"')
    assert settings["runtime.directory"][1:4] == ("string", "chosen at start", "any")


def test_each_default_is_allowed_and_reads_back(tmp_path: Path) -> None:
    lines = []
    for setting in describe():
        if setting.key not in configuration._DEFAULT_WORDS:
            section, _, name = setting.key.partition(".")
            lines.append(f"{section}.{name} = {setting.default}")
    assert load(written(tmp_path, "\n".join(lines))) == Config()
