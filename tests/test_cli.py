"""The command line: both doors are one program; settings from file, environment and flags; health; exit codes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from harness import MODEL, ROOT, ROUTER, Process, RustMock, Worker

# The second door, as a module; the console script is the same function, and beside the interpreter if it is installed.
DOORS = {"cargo": [ROUTER], "module": [sys.executable, "-m", "scls_router"]}
if (script := Path(sys.executable).parent / "scls-router").exists():
    DOORS["script"] = [str(script)]


def run(door: list[str], *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """With nothing set but what is given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SCLS_ROUTER_")}
    return subprocess.run(
        [*door, *args], capture_output=True, text=True, timeout=60, cwd=ROOT, env={**clean, "COLUMNS": "120", **env}
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "router.toml"
    path.write_text('port = 8080\nscheduler = "scls"\nslice-len = 16\nmodel = "m"\nfleet_key = "env:THE_KEY"\n')
    return path


def test_both_doors_are_the_same_program(file: Path) -> None:
    for args, code in [
        ([], 2),
        (["--help"], 0),
        (["-h"], 0),
        (["serve", "--help"], 0),
        (["up", "--help"], 0),
        (["config", "show", "--help"], 0),
        (["version"], 0),
        (["--version"], 0),
        (["config", "show"], 0),
        (["config", "show", "--origin", "--config", str(file), "--seed", "5"], 0),
        (["config", "check", "--config", str(file)], 0),
        (["config", "check", "--config", "router.ini"], 2),
        (["serve"], 2),
        (["serve", "--prot", "1"], 2),
        (["serve", "--worker-urls", "grpc://a:1", "--port", "1", "--grpc-port", "1"], 2),
        (["up", "--model", "no-such-model"], 2),
        (["health", "--port", "1"], 1),
    ]:
        answers = {}
        for name, door in DOORS.items():
            done = run(door, *args, THE_KEY="very secret", SCLS_ROUTER_GRPC_PORT="9001", SCLS_ROUTER_WORKER="2")
            answers[name] = (done.returncode, done.stdout, done.stderr)
        assert answers["cargo"][0] == code, (args, answers["cargo"])
        for name, answer in answers.items():
            assert answer == answers["cargo"], (args, name)
        assert "very secret" not in str(answers["cargo"])


def test_version_is_said_the_same_way_twice() -> None:
    said = run([ROUTER], "version").stdout
    assert said == run([ROUTER], "--version").stdout
    name, version = said.split()
    assert name == "scls-router" and version.count(".") == 2


def test_show_says_what_is_in_force_and_why(file: Path, tmp_path: Path) -> None:
    args = ["--config", str(file), "--policy", "random"]
    shown = run([ROUTER], "config", "show", "--origin", *args, THE_KEY="k", SCLS_ROUTER_PORT="9000").stdout
    lines = shown.splitlines()
    for line in [
        'policy = "random"  # flag --policy',
        "port = 9000  # env SCLS_ROUTER_PORT",
        f"slice_len = 16  # {file}",
        "seed = 0  # default",
        f'# fleet_key = "***"  # {file}',
        "# worker_urls is not set",
    ]:
        assert line in lines, shown
    # It is a configuration file itself.
    again = tmp_path / "shown.toml"
    again.write_text(shown)
    plain = run([ROUTER], "config", "show", "--config", str(again)).stdout
    assert plain.replace("# fleet_key is not set", '# fleet_key = "***"') == (
        run([ROUTER], "config", "show", *args, THE_KEY="k", SCLS_ROUTER_PORT="9000").stdout
    )


def test_a_wrong_setting_is_said_before_anything_listens(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text("port: 70000\nslice_length: 5\npolicy: product\n")
    expected = (
        f"error: {path}: port: invalid value '70000': 70000 is not in 0..=65535\n"
        f"error: {path}: slice_length: unknown key\ndid you mean slice_len?\n"
        "error: env SCLS_ROUTER_SEED: invalid value 'x': it is not an integer\n"
    )
    for command in (["config", "check"], ["config", "show"], ["serve", "--worker-urls", "grpc://127.0.0.1:1"]):
        done = run([ROUTER], *command, "--config", str(path), SCLS_ROUTER_SEED="x")
        assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_a_slice_length_is_for_the_papers_scheduler_alone(tmp_path: Path) -> None:
    path = tmp_path / "router.toml"
    path.write_text("slice_len = 8\n")
    serve = ["serve", "--worker-urls", "grpc://127.0.0.1:1"]
    up = ["up", "--model", str(MODEL)]
    hint = "scheduler scls alone has a slice length that can be set\n"
    for command in (["config", "check"], serve, up):
        for flags, env, at_fault in [
            (["--slice-len", "8"], {}, "slice_len (flag --slice-len) does not go with scheduler slice (default)"),
            (
                ["--scheduler", "ils"],
                {"SCLS_ROUTER_SLICE_LEN": "8"},
                "slice_len (env SCLS_ROUTER_SLICE_LEN) does not go with scheduler ils (flag --scheduler)",
            ),
            (
                ["--config", str(path)],
                {"SCLS_ROUTER_SCHEDULER": "sls"},
                f"slice_len ({path}: slice_len) does not go with scheduler sls (env SCLS_ROUTER_SCHEDULER)",
            ),
        ]:
            done = run([ROUTER], *command, *flags, **env)
            assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {at_fault}\n{hint}"), command
    for flags in (["--scheduler", "scls", "--slice-len", "8"], ["--scheduler", "scls", "--config", str(path)]):
        assert run([ROUTER], "config", "check", *flags).returncode == 0
    for flags in (["--slice-len", "0"], ["--scheduler", "scls", "--slice-len", "4294967296"], ["--scheduler", "lb"]):
        assert run([ROUTER], "config", "check", *flags).returncode == 2


def test_check_says_what_is_missing(file: Path) -> None:
    done = run([ROUTER], "config", "check", "--config", str(file), THE_KEY="k", SCLS_ROUTER_SLICE_LENGTH="5")
    assert done.stdout == "the settings are valid\nserve: needs worker_urls\nup: complete\n"
    assert done.stderr == (
        "warning: unknown environment variable SCLS_ROUTER_SLICE_LENGTH; "
        "the nearest that is read is SCLS_ROUTER_SLICE_LEN\n"
    )
    # A secret that is not there is found out before the router is started.
    done = run([ROUTER], "config", "check", "--config", str(file))
    assert done.returncode == 2 and "the environment variable is not set: THE_KEY" in done.stderr


def test_check_finds_a_key_that_no_client_can_send() -> None:
    done = run([ROUTER], "config", "check", SCLS_ROUTER_API_KEY="the-secret ä")
    assert done.returncode == 2 and "visible ASCII" in done.stderr, done.stderr
    assert "the-secret" not in done.stdout + done.stderr


def test_a_file_that_does_not_parse_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "router.toml"
    path.write_text('port = 1\napi_key = "the-secret\n')
    done = run([ROUTER], "config", "check", "--config", str(path))
    assert done.returncode == 2 and f"{path}: line 2, column 22: " in done.stderr, done.stderr
    assert "the-secret" not in done.stdout + done.stderr


def health(*args: str) -> tuple[int, str]:
    done = run([ROUTER], "health", *args)
    return done.returncode, done.stdout + done.stderr


def until_ready(*args: str) -> tuple[int, str]:
    """What it says once it is, or after 20 s."""
    deadline = time.monotonic() + 20
    while (said := health(*args))[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    return said


def test_a_router_serves_what_its_file_says_and_health_finds_it(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    with RustMock() as worker, Worker("--mock") as python_mock:
        path.write_text(
            f"worker-urls: [{worker.url}]\nport: 0\ngrpc_port: 0\nadmin_port: 0\npolicy: random\nlog_json: true\n"
        )
        assert health("--url", worker.url) == (0, f"ready: {worker.url}\n")
        assert health("--url", python_mock.url) == (0, f"ready: {python_mock.url}\n")
        process = Process([ROUTER, "serve", "--config", str(path)], {"http", "grpc", "admin"})
        with process:
            http, grpc = process.addresses["http"], process.addresses["grpc"]
            for url in (f"http://{http}", f"grpc://{grpc}"):
                assert until_ready("--url", url) == (0, f"ready: {url}\n")
            # Without a URL the port is a setting like any other: from a file, too.
            found = tmp_path / "found.toml"
            found.write_text(f"host = '0.0.0.0'\nport = {http.rsplit(':')[1]}\n")
            assert health("--config", str(found)) == (0, f"ready: http://{http}\n")
            worker.stop()
            code, said = health("--url", f"http://{http}")
            assert code == 1 and said.startswith(
                f"error: not ready: http://{http}: it is alive, but /ready answers 503: "
            )
        code, said = health("--url", f"http://{http}")
        assert code == 1 and "refused" in said
    assert any('"level"' in line for line in process.log), process.tail()


def test_health_does_not_wait_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for scheme in ("http", "grpc"):
            code, said = health("--url", f"{scheme}://127.0.0.1:{port}", "--timeout-secs", "1")
            assert (code, said) == (1, f"error: not ready: {scheme}://127.0.0.1:{port}: no answer within 1 s\n")


def test_health_shows_what_a_server_says_without_obeying_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            body = json.dumps({"error": {"message": "\x1b[2Jgone"}}).encode()
            for _ in range(2):
                with server.accept()[0] as connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 503 No\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

        thread = threading.Thread(target=answer)
        thread.start()
        code, said = health("--url", f"http://127.0.0.1:{server.getsockname()[1]}", "--timeout-secs", "5")
        thread.join(10)
    assert code == 1 and said.endswith("?[2Jgone\n"), said


def test_workers_run_in_the_interpreter_that_runs_the_router(tmp_path: Path) -> None:
    ports = ["--port", "0", "--grpc-port", "0", "--admin-port", "0"]
    args = ["up", "--model", str(MODEL), *ports, "--worker-args", "--no-such-flag"]
    # No python3 is on this path, and the worker that starts all the same does not know the flag.
    said = {name: run(door, *args, PATH=str(tmp_path)) for name, door in DOORS.items()}
    for name, done in said.items():
        expected = "cannot run python3" if name == "cargo" else "--no-such-flag"
        assert done.returncode == 1 and expected in done.stderr, (name, done.stderr)


MEASURED = {"layout": "paged", "prefill": {"per_token": 3.5e-5}, "step": {"constant": 0.003}}
QUALITY = {"r2": 0.99, "mean_error": 0.02, "p99_error": 0.1}
CALIBRATION = {
    "model": "m",
    "device": "cpu",
    "dtype": "float32",
    "layout": "paged",
    "fit": {"model": MEASURED, **QUALITY},
    "grid": [],
}


def python(folder: Path, code: str) -> str:
    """A Python that is no more than this."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, sys\nfrom pathlib import Path\n{code}\n")
    path.chmod(0o755)
    return str(path)


def test_calibrate_shows_the_workers_progress_and_what_came_of_it(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    worker = python(
        tmp_path,
        "print('calibrate  50%', file=sys.stderr)\nprint('not for scripts')\n"
        "print(sys.argv[1:], file=sys.stderr)\n"
        f"Path(sys.argv[sys.argv.index('--calibrate') + 1]).write_text({json.dumps(CALIBRATION)!r})",
    )
    args = ["calibrate", "--model", str(MODEL), "--out", str(out), "--python", worker, "--device", "cpu"]
    done = run([ROUTER], *args, "--worker-args", "--layout paged")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "m, paged, cpu, float32: 0 points\n  prefill  per_token 35.00 us\n  step     constant 3000 us\n"
        "  R2 0.9900, mean error 2.0 %, p99 10.0 %\n"
        f"written to {out}\nscls-router up --model {MODEL} --cost-model {out}\n"
    )
    asked = [
        "-m",
        "scls_worker",
        "--model",
        str(MODEL),
        "--calibrate",
        str(out),
        "--device",
        "cpu",
        "--layout",
        "paged",
    ]
    assert done.stderr == f"calibrate  50%\n{asked}\n"


def test_calibrate_says_what_went_wrong(tmp_path: Path) -> None:
    calibrate = ["calibrate", "--model", str(MODEL), "--out", str(tmp_path / "cost.json")]
    for code, expected, said in [
        ("sys.exit('scls-worker: no such folder')", 1, "the worker ended before it was calibrated"),
        ("sys.exit(2)", 2, "the worker cannot be calibrated"),
        ("pass", 1, "cannot read what the worker wrote"),
        ("Path(sys.argv[-1]).write_text('{}')", 1, "it holds no fit"),
    ]:
        done = run([ROUTER], *calibrate, "--python", python(tmp_path, code))
        assert (done.returncode, done.stdout) == (expected, "") and said in done.stderr, (code, done.stderr)
    done = run([ROUTER], *calibrate, "--python", str(tmp_path / "none"))
    assert done.returncode == 1 and "cannot run" in done.stderr
    for wrong in ([], ["--model", "no-such-model"]):
        assert run([ROUTER], "calibrate", *wrong).returncode == 2


def test_up_gives_its_workers_the_cost_model(tmp_path: Path) -> None:
    cost = tmp_path / "cost.json"
    worker = python(tmp_path, "sys.exit(' '.join(sys.argv))")
    up = ["up", "--model", str(MODEL), "--port", "0", "--grpc-port", "0", "--admin-port", "0", "--python", worker]
    done = run([ROUTER], *up, "--cost-model", str(cost))
    assert done.returncode == 2 and f"no such cost model: {cost}" in done.stderr, done.stderr
    cost.write_text("{}")
    done = run([ROUTER], *up, SCLS_ROUTER_COST_MODEL=str(cost))
    assert done.returncode == 1 and f"--model {MODEL} --cost-model {cost}" in done.stderr, done.stderr
