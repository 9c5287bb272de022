//! The binary as a process: what it says, and how it ends.

#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scls-router"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A router with these workers, and its HTTP and admin addresses.
fn serving(urls: &str) -> (Child, String, String) {
    let mut child = binary()
        .args(["serve", "--port", "0", "--grpc-port", "0", "--admin-port", "0", "--log-level", "debug"])
        .env("SCLS_ROUTER_WORKER_URLS", urls)
        .env("SCLS_ROUTER_LOG_JSON", "1")
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut address = || lines.next().unwrap().unwrap().rsplit(' ').next().unwrap().to_owned();
    let (http, _grpc, admin) = (address(), address(), address());
    (child, http, admin)
}

/// Its exit code, or none if it does not end in time.
fn ended_quietly(child: &mut Child, within: Duration) -> Option<i32> {
    let began = Instant::now();
    while began.elapsed() < within {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    None
}

/// The same; then it is ended.
fn ended(child: &mut Child, within: Duration) -> Option<i32> {
    let code = ended_quietly(child, within);
    let _ = child.kill();
    code
}

#[test]
fn it_serves_on_when_nobody_reads_its_log() {
    let (mut child, http, admin) = serving(" grpc://127.0.0.1:9  grpc://no-such-host.invalid:9 ");
    drop(child.stderr.take());
    let get = |address: &str, path: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
        std::io::read_to_string(stream).unwrap()
    };
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(100));
        assert!(get(&http, "/ready").starts_with("HTTP/1.1 503"));
        assert_eq!(get(&admin, "/workers").matches("\"url\"").count(), 2);
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(ended(&mut child, Duration::from_secs(5)), Some(0));
}

#[test]
fn wrong_flags_are_refused_before_anything_listens() {
    for args in [
        &["mock-worker", "--tokenizer", "/nonexist"][..],
        &["serve", "--worker-urls", "grpc://a b:1"],
        &["serve", "--worker-urls", "grpc://a:1", "--log-level", "loud"],
        &["serve", "--worker-urls", "grpc://a:1", "--max-payload-size", "0"],
    ] {
        let done = binary().args(args).output().unwrap();
        let error = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && done.stdout.is_empty(), "{args:?}");
        assert!(error.starts_with("error: "), "{args:?}: {error}");
    }
}

#[test]
fn a_second_signal_does_not_wait() {
    let mut worker = binary().args(["mock-worker", "--step-us", "5000"]).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(worker.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let (mut child, http, _admin) = serving(&format!("grpc://{}", line.trim().rsplit(' ').next().unwrap()));
    // Its log is not of interest, and must not fill the pipe.
    drop(child.stderr.take());
    let ask = |head: &str, body: &str| {
        let mut stream = TcpStream::connect(&http).unwrap();
        let length = body.len();
        write!(stream, "{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
            .unwrap();
        stream
    };
    let is_ready = || std::io::read_to_string(ask("GET /ready", "")).unwrap().starts_with("HTTP/1.1 200");
    let began = Instant::now();
    while !is_ready() {
        assert!(began.elapsed() < Duration::from_secs(10), "ready");
        std::thread::sleep(Duration::from_millis(20));
    }
    let running =
        ask("POST /v1/completions", r#"{"model": "mock", "prompt": [5], "max_tokens": 4000, "ignore_eos": true}"#);
    std::thread::sleep(Duration::from_millis(300));
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(ended_quietly(&mut child, Duration::from_millis(1500)), None, "it waits for the request");
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(ended(&mut child, Duration::from_secs(3)), Some(1));
    drop(running);
    worker.kill().unwrap();
    worker.wait().unwrap();
}
