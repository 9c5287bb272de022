"""The worker as a process, over real gRPC: what it prints, serves, and how it ends."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any, ClassVar

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb
from scls_router.proto import worker_pb2_grpc
from scls_worker.errors import StartupError
from scls_worker.info import digest
from scls_worker.options import build, parser
from worker_harness import ids_of, mock_output, of, start

LINE = "scls-worker listening on 127.0.0.1:"


class Process:
    running: ClassVar[list["Process"]] = []

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scls_worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(self)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(LINE), self.process.communicate()[1]
        self.address = line.split()[-1]
        self.channel = grpc.insecure_channel(self.address)
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)

    def end(self, timeout: float = 20) -> tuple[int, str]:
        """The exit code and the rest of stdout."""
        self.channel.close()
        out, err = self.process.communicate(timeout=timeout)
        assert "Traceback" not in err, err
        return self.process.returncode, out


class Talk:
    """One open session."""

    def __init__(self, process: Process, owner_epoch: int = 1) -> None:
        self.outgoing: Queue[Any] = Queue()
        self.incoming = process.stub.Session(iter(self.outgoing.get, None))
        self.say(hello=pb.Hello(owner_epoch=owner_epoch))

    def say(self, **body: Any) -> None:
        self.outgoing.put(pb.RouterMessage(**body))

    def until(self, body: str) -> list[pb.WorkerMessage]:
        messages = []
        for message in self.incoming:
            messages.append(message)
            if message.WhichOneof("body") == body:
                return messages
        raise AssertionError(f"the stream ended without {body}")


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    """A test that fails leaves no worker behind."""
    yield
    while Process.running:
        process = Process.running.pop()
        process.channel.close()
        if process.process.poll() is None:
            process.process.kill()
            process.process.communicate()


@pytest.fixture
def mock() -> Process:
    return Process("--mock", "--vocab", "1000", "--block-size", "4", "--step-us", "200", "--worker-id", "m")


def plan(number: int, *rows: pb.RowStart, base: int = 0, steps: int = 100) -> pb.Plan:
    return pb.Plan(plan_no=number, base_batch=base, keep=pb.Plan.KEEP_SURVIVORS, steps=steps, add=rows)


def test_a_session_on_the_mock(mock: Process) -> None:
    info = mock.stub.GetInfo(pb.GetInfoRequest())
    assert (info.worker_id, info.vocab_size, list(info.served_names), list(info.eos_token_ids)) == (
        "m",
        1000,
        ["mock"],
        [2],
    )
    assert list(mock.stub.GetTokenizer(pb.GetTokenizerRequest())) == []
    health = health_pb2_grpc.HealthStub(mock.channel)
    assert health.Check(health_pb2.HealthCheckRequest(service="scls.v1.Worker")).status == 1
    talk = Talk(mock)
    row = start(1, 30, 20)
    talk.say(plan=plan(1, row, steps=8))
    talk.say(plan=plan(2, base=1))
    messages = talk.until("slice_report") + talk.until("slice_report")
    drawn = [id_ for step in of(messages, "step") for part in step.rows for id_ in part.ids]
    assert drawn == mock_output(ids_of(row), 20)
    assert [message.state_seq for message in messages] == list(range(1, len(messages) + 1))
    assert {message.worker_epoch for message in messages} == {info.worker_epoch}


def test_what_a_mock_announces() -> None:
    paged = Process("--mock", "--step-us", "2000", "--prefill-us-per-token", "50")
    padded = Process("--mock", "--step-us", "2000", "--layout", "padded")
    silent = Process("--mock")
    infos = [process.stub.GetInfo(pb.GetInfoRequest()) for process in (paged, padded, silent)]
    assert [info.cost_shape for info in infos] == [
        common.COST_SHAPE_PAGED,
        common.COST_SHAPE_PADDED,
        common.COST_SHAPE_PAGED,
    ]
    assert infos[0].cost_model.paged.step_constant_s == pytest.approx(2e-3)
    assert infos[0].cost_model.paged.prefill_per_token_s == pytest.approx(5e-5)
    assert infos[1].cost_model.padded.prefill.constant_s == pytest.approx(2e-3)
    assert not infos[2].HasField("cost_model")


@pytest.mark.parametrize("layout", ["paged", "padded"])
def test_a_calibration_is_written_and_announced(tmp_path: Path, layout: str) -> None:
    path, arguments = tmp_path / "cost.json", ("--mock", "--step-us", "1000", "--layout", layout)
    done = subprocess.run(
        [sys.executable, "-m", "scls_worker", *arguments, "--calibrate", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "" and done.stderr.splitlines()[-1].startswith("calibrate 100%: r2 ")
    process = Process(*arguments, "--cost-model", str(path))
    model = process.stub.GetInfo(pb.GetInfoRequest()).cost_model
    fit = json.loads(path.read_text())["fit"]
    assert model.WhichOneof("form") == layout and model.mean_error == pytest.approx(fit["mean_error"])
    # The file says what was measured, not what the mock means to do.
    step = model.paged.step_constant_s if layout == "paged" else model.padded.step.constant_s
    assert step == pytest.approx(fit["model"]["step"]["constant"]) and step != 1e-3
    # Another vocabulary is another model.
    assert "model_digest" in fails("--mock", "--vocab", "500", "--layout", layout, "--cost-model", str(path))


def test_sigterm_says_goodbye_in_the_middle_of_a_slice(mock: Process) -> None:
    talk = Talk(mock)
    talk.say(plan=plan(1, start(1, 30, 5000), steps=5000))
    talk.until("step")
    mock.process.send_signal(signal.SIGTERM)
    talk.until("goodbye")
    assert list(talk.incoming) == []
    assert mock.end() == (0, "")


def test_the_end_of_a_stream_holds_rows_and_a_higher_epoch_gets_the_worker(mock: Process) -> None:
    first = Talk(mock)
    first.say(plan=plan(1, start(1, 30, 5000), steps=5000))
    first.until("step")
    first.incoming.cancel()
    same = Talk(mock)
    assert of(same.until("refused"), "refused")[0].reason == pb.Refused.REASON_NOT_OWNER
    assert list(same.incoming) == []
    second = Talk(mock, owner_epoch=2)
    second.until("snapshot")
    second.say(ping=pb.Ping(nonce=3))
    second.until("pong")
    third = Talk(mock, owner_epoch=3)
    third.until("snapshot")
    second.until("goodbye")


def test_bytes_that_are_no_messages_end_a_stream_and_not_the_worker(mock: Process) -> None:
    call = mock.channel.stream_stream("/scls.v1.Worker/Session")(iter([b"\xff\xff\xff nonsense"]))
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert mock.stub.GetInfo(pb.GetInfoRequest()).worker_id == "m"


def test_a_router_that_does_not_read_stops_the_slices_and_loses_nothing() -> None:
    process = Process(
        "--mock", "--vocab", "1000", "--ring", "8", "--max-rows", "64", "--max-context", "20000", "--blocks", "50000"
    )
    talk = Talk(process)
    # Wide steps fill the transport's own buffers soon.
    talk.say(plan=plan(1, *(start(i, 9, 10000) for i in range(64)), steps=10000))
    last = 1
    reports = []
    messages: list[pb.WorkerMessage] = []
    for message in talk.incoming:
        messages.append(message)
        if message.HasField("slice_report"):
            reports.append(message.slice_report)
            last += 1
            talk.say(plan=plan(last, base=last - 1, steps=100))
            if len(reports) == 3:
                break
    assert reports[0].end == pb.SliceReport.END_BACKPRESSURE and reports[0].steps < 10000
    assert [message.state_seq for message in messages] == list(range(1, len(messages) + 1))
    talk.incoming.cancel()
    process.process.terminate()
    assert process.end()[0] == 0


def test_exit_with_parent() -> None:
    process = Process("--mock", "--exit-with-parent")
    assert process.process.stdin is not None
    talk = Talk(process)
    talk.say(plan=plan(1, start(1, 30, 5000), steps=5000))
    talk.until("step")
    process.process.stdin.close()
    process.process.stdin = None
    talk.until("goodbye")
    assert process.end()[0] == 0


def test_the_mock_sends_a_tokenizer_and_never_imports_torch(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("x" * ((1 << 20) + 5))
    (tmp_path / "chat_template.jinja").write_text("")
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from scls_worker.__main__ import main; main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--mock", "--tokenizer", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]
    with grpc.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        chunks = list(stub.GetTokenizer(pb.GetTokenizerRequest()))
        assert [(chunk.name, len(chunk.data), chunk.last_of_file) for chunk in chunks] == [
            ("tokenizer.json", 1 << 20, False),
            ("tokenizer.json", 5, True),
            ("chat_template.jinja", 0, True),
        ]
        info = stub.GetInfo(pb.GetInfoRequest())
        assert info.tokenizer_digest == digest(tmp_path.iterdir())
    process.terminate()
    assert process.wait(20) == 0


# ---------------------------------------------------------------- folders and flags that cannot be served


def fails(*arguments: str) -> str:
    """The one line on stderr of a worker that does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "scls_worker", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("scls-worker: ") and all(line.startswith("  ") for line in lines[1:]), done.stderr
    return done.stderr


def test_bad_flags() -> None:
    assert "--step-us" in fails("--model", "/nowhere", "--step-us", "5")
    assert "--vocab" in fails("--mock", "--vocab", "3")
    assert (
        "--layout"
        in subprocess.run(
            [sys.executable, "-m", "scls_worker", "--mock", "--layout", "x"],
            capture_output=True,
            text=True,
            check=False,
        ).stderr
    )
    assert "cannot read --cost-model" in fails("--mock", "--cost-model", "/nowhere")
    assert "no such folder" in fails("--mock", "--calibrate", "/nowhere/at/all")
    assert "tokenizer.json" in fails("--mock", "--tokenizer", "/nowhere")
    taken = Process("--mock")
    assert taken.address in fails("--mock", "--port", taken.address.split(":")[1])
    taken.process.terminate()
    assert taken.end()[0] == 0


def test_bad_model_folders(tmp_path: Path) -> None:
    tiny_llama = pytest.importorskip("tiny_llama")
    pytest.importorskip("transformers")
    assert "no such model folder" in fails("--model", str(tmp_path / "none"))
    folder = tiny_llama.write(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())

    def refused(text: str) -> None:
        with pytest.raises(StartupError, match=text):
            build(parser().parse_args(["--model", str(folder), "--device", "cpu"]))

    def refused_config(text: str, **changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        refused(text)
        (folder / "config.json").write_text(json.dumps(config))

    refused_config("gpt_oss .*attention sinks", model_type="gpt_oss")
    refused_config("auto_map", auto_map={"AutoModel": "evil.Model"})
    refused_config("quantized", quantization_config={"bits": 4})
    # A layer more than the file has weights for: transformers would make them up.
    refused_config("missing", num_hidden_layers=3)
    (folder / "config.json").write_text("{")
    refused("config.json")
    (folder / "config.json").unlink()
    refused("no config.json")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").rename(folder / "t")
    refused("no tokenizer.json")
    (folder / "t").rename(folder / "tokenizer.json")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "cannot load" in fails("--model", str(folder))
    weights.rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in fails("--model", str(folder))
    (folder / "pytorch_model.bin").unlink()
    refused("no weights")
