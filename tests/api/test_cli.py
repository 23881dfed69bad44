"""The command line as people and scripts use it: real processes, a real engine, the printed commands really executed."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from api.cli import COMMANDS, cli, demo_data, import_counters, options
from api.cli.config import as_toml
from api.cli.exits import MEANINGS, Exit
from engine import config as configuration
from engine import datadir
from engine.core.slots import make_cutoff, resolve

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-c", "from api.cli import main; main()"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("SLOTKEEPER_", "NOTIFY_"))}
WAIT_SECONDS = 60
GOLDEN = ROOT / "tests" / "engine" / "golden" / "release-0.1.0"


class Ended(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output, which must be one JSON document."""
        return json.loads(self.out)


def run(*words: object, stdin: bytes = b"", environment: dict[str, str] | None = None) -> Ended:
    """Run a command to its end."""
    process = subprocess.run(
        [*PROGRAM, *map(str, words)],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=ENVIRONMENT | (environment or {}),
        timeout=WAIT_SECONDS,
        check=False,
    )
    return Ended(process.returncode, process.stdout.decode(), process.stderr.decode())


class Engine(NamedTuple):
    """An engine that serves."""

    url: str
    data: Path
    process: subprocess.Popen[bytes]


@contextmanager
def engine(data: Path, *words: str) -> Iterator[Engine]:
    """`slotkeeper serve` on any free port until the end of the block. Readiness is what it tells systemd."""
    with (
        tempfile.TemporaryDirectory(prefix="slotkeeper-test-", dir="/dev/shm") as runtime,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
    ):
        address = f"{runtime}.notify"
        notify.bind(address)
        notify.settimeout(WAIT_SECONDS)
        process = subprocess.Popen(
            [*PROGRAM, "serve", "--data", str(data), "--listen", "127.0.0.1:0", "--api", "1", *words],
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=ENVIRONMENT | {"NOTIFY_SOCKET": address, "RUNTIME_DIRECTORY": runtime},
        )
        try:
            while b"READY=1" not in notify.recv(4096):
                continue
            state = json.loads((Path(runtime) / datadir.STATE_NAME).read_bytes())
            yield Engine(f"http://{state['listen']}", data, process)
        finally:
            process.terminate()
            process.wait(WAIT_SECONDS)
            Path(address).unlink()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine with two shards and the demo's pools, for all tests that only need one."""
    data = tmp_path_factory.mktemp("served") / "data"
    assert run("init", data, "--shards", 2).code == Exit.OK
    with engine(data) as running:
        assert "no pools yet" in run("pools", "--url", running.url).out
        for pool in demo_data.POOLS:
            put(running.url, f"/v1/pools/{pool.pool_id}", demo_data.pool_body(pool))
        yield running


def put(url: str, path: str, body: object) -> None:
    """PUT something that must be taken."""
    from api.cli.client import Service

    with Service(url) as service:
        assert service.ask("PUT", path, json.dumps(body).encode()).status in (200, 201)


@pytest.fixture
def nowhere() -> Iterator[str]:
    """A URL at which nothing listens, and nothing else can come to listen."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command, subcommands included, by its full name."""

    def walk(prefix: str, group: click.Group) -> Iterator[tuple[str, click.Command]]:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            if isinstance(command, click.Group):
                yield from walk(f"{prefix} {name}", command)
            else:
                yield f"{prefix} {name}", command

    yield from walk("slotkeeper", cli)


# --- the program -------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_loads_nothing_for_it() -> None:
    heavy = {"trio", "numpy", "msgspec", "rich", "http.client", "structlog", "sqlite3", "engine.config"}
    script = (
        "import sys\nfrom api.cli import cli\ncli(['--help'], standalone_mode=False)\n"
        f"print('loaded:', sorted({heavy!r} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert out.endswith("loaded: []\n")
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.help)}$", out, re.MULTILINE), name


def test_the_list_of_commands_says_what_the_commands_say() -> None:
    for name, entry in COMMANDS.items():
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert (command.help or "").split("\n\n")[0].strip() == entry.help, name


def test_version_and_an_unknown_command() -> None:
    assert re.fullmatch(r"slotkeeper \d+\.\d+\.\d+\n", run("--version").out)
    ended = run("frobnicate")
    assert ended.code == Exit.USAGE
    assert "No such command 'frobnicate'" in ended.err


def test_the_module_of_the_engine_is_the_same_program() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "engine", "--version"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    assert out.decode() == run("--version").out


def test_the_shell_completes_commands() -> None:
    words = {"_SLOTKEEPER_COMPLETE": "bash_complete", "COMP_WORDS": "slotkeeper sta", "COMP_CWORD": "1"}
    assert run(environment=words).out.split() == ["plain,status"]


def test_the_default_url_is_where_an_engine_listens_by_default() -> None:
    assert f"http://{configuration.load(None).address}" == options.URL_DEFAULT


# --- documentation -----------------------------------------------------------------------------------------------------


def section(name: str) -> str:
    """The part of docs/cli.md under a heading."""
    text = (ROOT / "docs/cli.md").read_text()
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/cli.md: write a section '## {name}'"
    return found[1]


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_command_and_option_is_documented(name: str) -> None:
    text = section(name)
    command = dict(commands())[name]
    assert f"`{name}" in text, f"docs/cli.md: begin the section '## {name}' with its usage"
    for parameter in command.params:
        for spelling in parameter.opts if isinstance(parameter, click.Option) else []:
            assert f"| `{spelling}`" in text, f"docs/cli.md: document {spelling} in the table of '## {name}'"


def test_documented_commands_and_options_exist() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    known = dict(commands())
    for name in re.findall(r"^## (slotkeeper .*)$", text, re.MULTILINE):
        assert name in known, f"docs/cli.md: there is no command '{name}'"
        spellings = {spelling for parameter in known[name].params for spelling in parameter.opts}
        documented = set(re.findall(r"^\| `(--[a-z-]+)`", section(name), re.MULTILINE))
        assert documented <= spellings, f"docs/cli.md: '{name}' has no {documented - spellings}"


def test_exit_codes_are_documented_as_they_are() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", section("Exit codes"), re.MULTILINE)
    assert rows == [(str(int(code)), meaning) for code, meaning in MEANINGS.items()]
    assert list(MEANINGS) == list(Exit)


def test_every_setting_is_documented_as_it_is() -> None:
    lines = (ROOT / "docs/configuration.md").read_text().splitlines()
    documented = [line for line in lines if line.startswith("| `")]
    expected = [
        f"| `{setting.key}` | {setting.type} | {setting.default} | {setting.range} | {setting.meaning} |"
        for setting in configuration.describe()
    ]
    assert documented == expected, "docs/configuration.md: its tables must say what engine.config.describe() says"


# --- init, serve, config -----------------------------------------------------------------------------------------------


def test_init_makes_a_data_directory(tmp_path: Path) -> None:
    ended = run("init", tmp_path / "made" / "here", "--shards", 3, "--json")
    assert ended.code == Exit.OK
    assert ended.document["shards"] == 3
    assert datadir.load(tmp_path / "made" / "here").store_id == ended.document["store_id"]


def test_init_takes_a_shard_for_each_core(tmp_path: Path) -> None:
    ended = run("init", tmp_path / "data")
    assert (ended.code, ended.err) == (Exit.OK, "")
    assert datadir.load(tmp_path / "data").shards == configuration.cores()


def test_init_refuses_a_directory_with_other_things(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    ended = run("init", tmp_path, "--json")
    assert ended.code == ended.document["exit_code"] == Exit.UNUSABLE
    assert "letter.txt" in ended.document["error"]
    assert "letter.txt" in ended.err
    assert run("init", tmp_path, "--shards", 0).code == Exit.USAGE


def test_serve_says_what_is_wrong_with_a_directory(tmp_path: Path) -> None:
    ended = run("serve", "--data", tmp_path)
    assert ended.code == Exit.UNUSABLE
    assert ended.err.startswith(f"slotkeeper: {tmp_path}: ")


def test_serve_says_everything_that_is_wrong_with_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "slotkeeper.toml"
    file.write_text('[server]\nlissten = "127.0.0.1:1"\n[api]\ndeadline_ms = 5\n')
    ended = run("serve", "--data", tmp_path, "--config", file, "--api", 0)
    assert ended.code == Exit.UNUSABLE
    for text in ("server.lissten: unknown key", "api.deadline_ms: 5", "command line: server.api_processes: 0"):
        assert text in ended.err


def test_serve_refuses_a_taken_address_and_a_served_directory(served: Engine, tmp_path: Path) -> None:
    run("init", tmp_path / "data", "--shards", 1)
    taken = run("serve", "--data", tmp_path / "data", "--listen", served.url.removeprefix("http://"))
    assert taken.code == Exit.SYSTEM
    assert "another process listens there" in taken.err
    second = run("serve", "--data", served.data, "--listen", "127.0.0.1:0")
    assert second.code == Exit.UNUSABLE
    assert str(served.process.pid) in second.err


def test_config_check_prints_a_file_that_means_the_same(tmp_path: Path) -> None:
    file = tmp_path / "slotkeeper.toml"
    file.write_text(
        '[reservations]\nttl_seconds_max = 60\n[log]\nformat = "json"\n[runtime]\ndirectory = "/run/a \\"b\\""\n'
    )
    printed = run("config", "check", file, "--print")
    assert printed.code == Exit.OK
    again = tmp_path / "again.toml"
    again.write_text(printed.out)
    assert configuration.load(again) == configuration.load(file)
    assert run("config", "check", again, "--json").document["config"]["reservations"]["ttl_seconds_max"] == 60
    assert tomllib.loads(as_toml(configuration.load(None)))["server"]["listen"] == "127.0.0.1:7411"


def test_config_check_lists_problems(tmp_path: Path) -> None:
    file = tmp_path / "slotkeeper.toml"
    file.write_text("[api]\ndeadline = 1\n[overload]\nqueue_ms_max = 0\n")
    ended = run("config", "check", file, "--json")
    assert ended.code == Exit.UNUSABLE
    assert len(ended.document["problems"]) == 2
    assert run("config", "check", tmp_path / "missing.toml").code == Exit.UNUSABLE


# --- asking a service --------------------------------------------------------------------------------------------------


def test_status_shows_each_shard(served: Engine) -> None:
    ended = run("status", "--url", served.url)
    assert ended.code == Exit.OK
    assert [line.split()[:3] for line in ended.out.splitlines()[1:3]] == [
        ["0", "serving", "yes"],
        ["1", "serving", "yes"],
    ]
    assert run("status", "--json", environment={"SLOTKEEPER_URL": served.url}).document["ready"] is True


def test_pools_shows_names_as_they_are(served: Engine) -> None:
    out = run("pools", "--url", served.url).out
    assert re.search(r"^van-north +logistics +stop +north +Europe/Berlin +90 min before", out, re.MULTILINE)
    assert re.search(r"^pick-dc1 .* 18:00 the day before", out, re.MULTILINE)
    listed = run("pools", "--url", served.url, "--json").document["pools"]
    assert [pool["pool_id"] for pool in listed] == sorted(pool.pool_id for pool in demo_data.POOLS)


@pytest.mark.parametrize("words", [("status",), ("pools",), ("import", "-")])
def test_nothing_listens(words: tuple[str, ...], nowhere: str) -> None:
    ended = run(*words, "--url", nowhere, "--json")
    assert ended.code == ended.document["exit_code"] == Exit.UNAVAILABLE
    assert "nothing listens there" in ended.err
    assert "slotkeeper serve" in ended.err


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<html", "not as Slotkeeper does"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "ended the connection"),
        (b"", "ended the connection"),
    ],
)
def test_something_else_listens(answer: bytes, says: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve_once() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve_once)
        thread.start()
        ended = run("status", "--url", f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert ended.code == Exit.UNAVAILABLE
    assert says in ended.err


@pytest.mark.parametrize(
    "url", ["localhost:7411", "ftp://localhost", "http://", "http://localhost:port", "http://a/?b"]
)
def test_a_url_that_is_none(url: str) -> None:
    assert run("status", "--url", url).code == Exit.USAGE


def test_a_service_that_is_not_ready_is_a_failed_check() -> None:
    document = {"ready": False, "version": "0", "pools": 0, "plan_version": 0, "shards": []}
    body = json.dumps(document).encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve_once() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

        thread = threading.Thread(target=serve_once)
        thread.start()
        ended = run("status", "--url", f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert ended.code == Exit.REFUSED
    assert "NOT READY" in ended.out


# --- import ------------------------------------------------------------------------------------------------------------

ZONES = {"van-north": "Europe/Berlin", "pick-dc1": "Europe/Berlin"}
HEADER = "pool_id,slot_id,base,overbook,buffer,closed\n"


def problems_of(*rows: str) -> list[tuple[int, str]]:
    """The bad rows of a file."""
    return [(row.line, row.problem) for row in import_counters.read([HEADER, *(f"{row}\n" for row in rows)], ZONES).bad]


def test_a_file_is_read() -> None:
    rows = ["van-north,2031-03-03T18:00-20:00,40,2,1,yes\n", "\n", '"pick-dc1", 2031-03-03T05:00-13:00 ,7,,,\n']
    found = import_counters.read([HEADER, *rows], ZONES)
    assert found.bad == []
    assert [(one.pool_id, one.base, one.overbook, one.buffer, one.closed) for one in found.counters] == [
        ("van-north", 40, 2, 1, True),
        ("pick-dc1", 7, 0, 0, False),
    ]


def test_columns_stand_in_any_order_and_may_be_few_and_separated_by_semicolons() -> None:
    found = import_counters.read(["base;slot_id;pool_id\n", "3;2031-03-03T18:00-20:00;van-north\n"], ZONES)
    assert [(one.pool_id, one.slot_id, one.base) for one in found.counters] == [
        ("van-north", "2031-03-03T18:00-20:00", 3)
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("van-west,2031-03-03T18:00-20:00,40,,,", "no pool 'van-west'"),
        ("van north,2031-03-03T18:00-20:00,40,,,", "pool_id 'van north'"),
        ("van-north,tomorrow,40,,,", "slot_id 'tomorrow'"),
        ("van-north,2031-02-30T18:00-20:00,40,,,", "day is out of range"),
        ("van-north,2031-03-30T02:00-03:00,40,,,", "the clock skips it"),
        ("van-north,2031-03-03T18:00-20:00,,,,", "base '': not a whole number"),
        ("van-north,2031-03-03T18:00-20:00,-1,,,", "base '-1'"),
        ("van-north,2031-03-03T18:00-20:00,4.5,,,", "base '4.5'"),
        ("van-north,2031-03-03T18:00-20:00,\u0663,,,", "not a whole number"),
        ("van-north,2031-03-03T18:00-20:00,9007199254740993,,,", "base 9007199254740993"),
        (f"van-north,2031-03-03T18:00-20:00,{'9' * 5_000},,,", "base 9999"),
        ("van-north,2031-03-03T18:00-20:00,40,,,perhaps", "write true or false"),
        ("van-north,2031-03-03T18:00-20:00,40", "3 cells where the header has 6"),
        ('van-north,"2031-03-03T18:00"x,40,,,', "not CSV"),
    ],
)
def test_a_bad_row_is_named_with_its_line(row: str, says: str) -> None:
    good = "pick-dc1,2031-03-03T18:00-20:00,40,,,"
    [(line, problem)] = problems_of(good, row)
    assert line == 3
    assert says in problem


def test_the_same_counter_twice() -> None:
    row = "pick-dc1,2031-03-03T18:00-20:00,40,,,"
    assert problems_of(row, row) == [(3, "pick-dc1 2031-03-03T18:00-20:00 stands in line 2 already")]


def test_more_rows_than_one_import_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_counters, "IMPORTED_COUNTERS_MAX", 2)
    rows = [f"pick-dc1,2031-03-03T18:00-20:0{minute},40,,," for minute in range(4)]
    assert problems_of(*rows) == [(4, "more than 2 rows: split the file")]


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("", "lacks pool_id, slot_id, base"),
        ("pool_id,slot_id,base,limit\n", "has 'limit'"),
        ("pool_id,slot_id\n", "lacks base"),
        ("pool_id,slot_id,base,base\n", "twice"),
        ("van-north,2031-03-03T18:00-20:00,40\n", "must name the columns"),
    ],
)
def test_a_header_that_is_none(header: str, says: str) -> None:
    with pytest.raises(import_counters.HeaderError, match=re.escape(says)):
        import_counters.read([header], ZONES)


def test_import_defines_counters_once(served: Engine) -> None:
    content = HEADER + "van-north,2031-03-03T18:00-20:00,40,2,1,false\nvan-south,2031-03-03T18:00-20:00,24,,,\n"
    file = served.data.parent / "counters.csv"
    file.write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    dry = run("import", file, "--url", served.url, "--dry-run", "--json")
    assert dry.document == {"ok": True, "dry_run": True, "counters": 2}
    first = run("import", file, "--url", served.url, "--reason", "spring", "--json").document
    again = run("import", "-", "--url", served.url, "--json", stdin=file.read_bytes()).document
    assert (first["counters"], first["created"]) == (2, 2)
    assert (again["counters"], again["created"]) == (2, 0)
    assert "2 counters defined, 0 of them new" in run("import", file, "--url", served.url).out


def test_import_is_all_or_nothing_and_lists_a_hundred_bad_rows(served: Engine) -> None:
    before = run("status", "--url", served.url, "--json").document["plan_version"]
    rows = [
        "van-north,2031-04-04T18:00-20:00,40,,,",
        *(f"van-{number},2031-04-04T18:00-20:00,1,,," for number in range(130)),
    ]
    content = (HEADER + "\n".join(rows)).encode()
    ended = run("import", "-", "--url", served.url, "--json", stdin=content)
    assert ended.code == Exit.REFUSED
    assert (ended.document["rows"], ended.document["bad_rows"], len(ended.document["problems"])) == (131, 130, 100)
    assert ended.document["problems"][0]["line"] == 3
    assert ended.err.endswith("  and 30 more\n")
    assert run("status", "--url", served.url, "--json").document["plan_version"] == before


def test_import_shows_what_the_service_refuses(served: Engine) -> None:
    content = (HEADER + "van-north,2031-03-03T18:00-20:00,40,,,\n").encode()
    ended = run("import", "-", "--url", served.url, "--reason", "a\nb", "--json", stdin=content)
    assert ended.code == Exit.REFUSED
    assert ended.document["problem"]["code"] == "invalid_request"
    assert "reason" in ended.err


def test_import_wants_text_and_rows(served: Engine) -> None:
    latin = run("import", "-", "--url", served.url, stdin=HEADER.encode() + b"van-n\xf6rd,,,,,\n")
    assert (latin.code, "line 2 is not UTF-8" in latin.err) == (Exit.REFUSED, True)
    empty = run("import", "-", "--url", served.url, stdin=HEADER.encode())
    assert (empty.code, "the file has no rows" in empty.err) == (Exit.REFUSED, True)
    long = run("import", "-", "--url", served.url, "--reason", "x" * 501, stdin=HEADER.encode())
    assert long.code == Exit.USAGE


# --- verify ------------------------------------------------------------------------------------------------------------


def test_verify_proves_beside_a_live_engine_and_after_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    run("init", data, "--shards", 1)
    with engine(data) as running:
        put(running.url, "/v1/pools/van-north", demo_data.pool_body(demo_data.POOLS[0]))
        put(running.url, "/v1/pools/van-north/slots/2031-03-03T18:00-20:00", {"base": 4})
        live = run("verify", data, "--json")
    assert live.code == Exit.OK
    assert live.document["ok"] is True
    assert live.document["shards"][0]["counters"] == 1
    after = run("verify", data)
    assert after.code == Exit.OK
    assert "proven: " in after.out
    segment = min((data / "shard-00").glob("*.sqlite"))
    with sqlite3.connect(segment) as connection:
        connection.execute("UPDATE batch SET body = replace(body, '2031', '2032')")
    connection.close()
    for words in (("verify", data, "--json"), ("verify", data)):
        damaged = run(*words)
        assert damaged.code == Exit.REFUSED, damaged
    assert "shard-00: PROBLEM: " in damaged.out
    assert "NOT PROVEN" in damaged.out


def test_verify_shows_what_lies_between_the_shards(tmp_path: Path) -> None:
    """The golden directory has reservations over both of its shards; one shard without its journal's end contradicts it."""
    data = tmp_path / "data"
    shutil.copytree(GOLDEN, data)
    whole = run("verify", data)
    assert whole.code == Exit.OK
    (line,) = [line for line in whole.out.splitlines() if line.split()[:1] == ["all"]]
    assert line.split() == ["all", "7", "7", "0", "0", "0", "0"]
    cross = run("verify", data, "--json").document["cross"]
    assert (cross["reservations"], cross["parts"], cross["problems"]) == (7, 7, [])
    (data / "shard-01" / "watermark").unlink()
    for segment in sorted((data / "shard-01").glob("*.sqlite"))[1:]:
        segment.unlink()
    torn = run("verify", data)
    assert torn.code == Exit.REFUSED
    problems = run("verify", data, "--json").document["cross"]["problems"]
    assert problems
    assert [line for line in torn.out.splitlines() if "between shards: PROBLEM: " in line] == [
        f"between shards: PROBLEM: {problem}" for problem in problems
    ]
    (line,) = [line for line in torn.out.splitlines() if line.split()[:1] == ["all"]]
    assert line.split()[-1] == str(len(problems))


def test_verify_wants_a_data_directory(tmp_path: Path) -> None:
    ended = run("verify", tmp_path)
    assert ended.code == Exit.UNUSABLE
    assert str(tmp_path) in ended.err


# --- demo --------------------------------------------------------------------------------------------------------------


def test_demo_data_is_possible_on_any_day() -> None:
    for today in (date(2026, 3, 20), date(2026, 10, 16), date(2026, 12, 24), date(2027, 1, 3)):
        pools = {pool.pool_id: pool for pool in demo_data.POOLS}
        rows = demo_data.counters(today)
        limits = {}
        for row in rows:
            pool_id, slot_id = str(row["pool_id"]), str(row["slot_id"])
            resolve(slot_id, pools[pool_id].time_zone)
            make_cutoff(**pools[pool_id].cutoff)  # type: ignore[arg-type]  # the rule as JSON has it
            limits[pool_id, slot_id] = int(str(row["base"])) + int(str(row["overbook"])) - int(str(row["buffer"]))
            assert slot_id[:10] > str(today)
        assert len(limits) == len(rows) > 200
        assert demo_data.shown_slot(today) in limits
        for order in demo_data.standing_orders(today):
            assert 0 < order.quantity < limits[order.pool_id, order.slot_id]


@contextmanager
def demo(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`slotkeeper demo` and what it printed until it had no more to say."""
    process = subprocess.Popen(
        [*PROGRAM, "demo", "--no-open", *words], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    try:
        yield process, read_until(process, "Ctrl-C stops it.")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=WAIT_SECONDS)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Standard output up to and with a line that has this text. What never comes ends by the test's own timeout."""
    assert process.stdout is not None
    lines: list[str] = []
    while not (lines and text in lines[-1]):
        line = process.stdout.readline()
        assert line, f"it ended without {text!r}: {''.join(lines)}"
        lines.append(line)
    return "".join(lines)


def shell(line: str) -> str:
    """What a person sees who copies a printed line into a shell."""
    return subprocess.run(
        ["/bin/sh", "-c", line], cwd=ROOT, capture_output=True, check=True, text=True, timeout=WAIT_SECONDS
    ).stdout


def test_the_demo_can_be_copied_line_by_line() -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is missing: the printed lines cannot be tried")
    with demo("--listen", "127.0.0.1:0") as (process, said):
        reserve, look, kill, verify = (
            line.strip() for line in said.splitlines() if line.startswith("   ") and line.strip()
        )
        seconds = re.search(r"ready after ([\d.]+) s", said)
        assert seconds is not None
        assert float(seconds[1]) < 30
        data = Path(str(re.search(r"data:  (\S+)", said)[1]))  # type: ignore[index]  # it is there, or this fails
        reservation = json.loads(shell(reserve))
        assert reservation["status"] == "held"
        assert json.loads(shell(reserve))["reservation_id"] == reservation["reservation_id"]
        [held] = reservation["lines"]
        left = {counter["slot_id"]: counter for counter in json.loads(shell(look))["counters"]}
        assert left[held["slot_id"]]["available"] > 0
        title = Path(f"/proc/{kill.split()[-1]}/cmdline").read_text().rstrip("\0")
        assert title == f"slotkeeper: worker {reservation['position'].partition('-')[0]}"
        shell(kill)
        assert "killed by SIGKILL" in read_until(process, ": back after")
        assert json.loads(shell(reserve))["reservation_id"] == reservation["reservation_id"]
        program = verify.split(" verify ")[0]
        assert verify == f"{program} verify {data}"
        assert run("verify", data).code == Exit.OK
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_SECONDS) == Exit.OK
    assert not data.exists()


def test_the_demo_keeps_a_directory_that_was_given_and_uses_it_again_where_its_usual_port_is_taken(
    tmp_path: Path,
) -> None:
    data = tmp_path / "kept"
    usual = configuration.load(None).address
    with socket.socket() as occupier:
        # If somebody else has it already, that serves as well.
        with suppress(OSError):
            occupier.bind(tuple(usual))
            occupier.listen()
        for _ in range(2):
            with demo("--data", str(data)) as (process, said):
                assert str(data) in said
                assert f"{usual}/" not in said
                process.send_signal(signal.SIGTERM)
                assert process.wait(WAIT_SECONDS) == Exit.OK
    assert run("verify", data).code == Exit.OK


def test_the_demo_leaves_the_data_of_others_alone(served: Engine, tmp_path: Path) -> None:
    busy = run("demo", "--data", served.data, "--listen", "127.0.0.1:0")
    assert busy.code == Exit.UNUSABLE
    assert "is in use by the supervisor" in busy.err
    data = tmp_path / "theirs"
    run("init", data, "--shards", 1)
    with engine(data) as running:
        put(running.url, "/v1/pools/theirs", demo_data.pool_body(demo_data.POOLS[0]))
    events = run("verify", data, "--json").document["planner"]["events"]
    ended = run("demo", "--data", data, "--listen", "127.0.0.1:0")
    assert ended.code == Exit.UNUSABLE
    assert "pools that are not of the demo (theirs)" in ended.err
    # The term that the planner began, and nothing else.
    assert run("verify", data, "--json").document["planner"]["events"] == events + 1
