//! What a later turn of a long conversation costs: from the text of its prompt to the decision among 64 workers, beside
//! what the tokenizer alone takes for the new text; and what stands before that, parsing the body and rendering.
//!
//! Every round is a second turn that nobody has seen: the conversation so far is known, its last answer as the ids that
//! were generated, and the user's next message is new. Medians of all rounds; run it with `make bench-core`.
//! `SCLS_BENCH_JSON` names a file for the report.

use std::hint::black_box;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use router_core::{
    BlockHash, BlockSize, Blocks, Config, Epoch, Event, Layout, Micros, Mode, ModelSpec, PolicyName, Scheduler, Tokens,
    WorkerId, WorkerMessage, WorkerSpec, hash_blocks,
};
use router_server::conversation::Conversations;
use router_server::json::{Parsed, items};
use router_server::request::Chat;
use router_server::template::ChatTemplate;
use router_server::tokenizer::Tokenizer;
use serde_json::{Value, json};

const WORKERS: u32 = 64;
const TOKENS: usize = 16_384;
const ROUNDS: usize = 500;
/// Tokens of an answer that is learned.
const ANSWER: usize = 1000;
/// What a second turn may cost beside the tokenizer's own time for its new text, and how much of that time.
const BUDGET: (Duration, f64) = (Duration::from_micros(120), 1.15);
const ROOT: BlockHash = BlockHash(1);

/// A part of the way, and how long it took in each round.
type Part = (&'static str, Vec<Duration>);

fn main() -> ExitCode {
    let bench = Bench::new();
    let (messages, answer) = bench.first_turn();
    println!(
        "second turn of a conversation of {} messages, {} tokens; {WORKERS} workers; medians of {ROUNDS} rounds",
        messages.len(),
        bench.whole(&messages).len()
    );
    let (parts, alone) = bench.rounds(&messages, &answer);
    for (name, times) in &parts[..2] {
        println!("{:>12}  {name}", micros(median(times)));
    }
    let total = median(&sums(&parts[2..]));
    println!("{:>12}  text to decision", micros(total));
    for (name, times) in &parts[2..] {
        println!("{:>12}    {name}", micros(median(times)));
    }
    println!("{:>12}  all of it, body to decision", micros(median(&sums(&parts))));
    let alone = median(&alone);
    println!("{:>12}  the tokenizer alone, for the new text", micros(alone));
    println!("{:>12}  learning an answer of {ANSWER} tokens", micros(bench.learning(&answer)));
    println!("{:>12}  a hop to the blocking pool and back", micros(hop()));
    let allowed = BUDGET.0 + alone.mul_f64(BUDGET.1);
    if let Some(file) = std::env::var_os("SCLS_BENCH_JSON") {
        let us = |time: Duration| (time.as_secs_f64() * 1e7).round() / 10.0;
        let rows = [("body to decision", median(&sums(&parts))), ("text to decision", total)].into_iter();
        let rows = rows.chain(parts.iter().map(|(name, times)| (*name, median(times))));
        let rows = rows.chain([("the tokenizer alone, for the new text", alone), ("allowed", allowed)]);
        let rows: Vec<Value> = rows.map(|(name, time)| json!({"part": name, "us": us(time)})).collect();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let report = json!({
            "name": "core", "command": "make bench-core", "commit": said("git", &["rev-parse", "--short", "HEAD"]),
            "when": said("date", &["-u", "+%Y-%m-%d"]), "machine": {"cpu": cpu(), "cores": cores, "gpu": null},
            "tokens": bench.whole(&messages).len(), "workers": WORKERS,
            "rounds": ROUNDS, "rows": rows, "holds": total <= allowed,
        });
        std::fs::write(file, format!("{report:#}\n")).expect("the report is written");
    }
    let (verdict, code) = if total <= allowed { ("pass", 0) } else { ("FAIL", 1) };
    println!("{verdict}: {} of {} (120 us + 1.15 x the tokenizer alone)", micros(total), micros(allowed));
    ExitCode::from(code)
}

/// What a program prints, or that it is not known.
fn said(program: &str, args: &[&str]) -> String {
    let done = Command::new(program).args(args).output().ok().filter(|done| done.status.success());
    done.map_or_else(|| "unknown".to_owned(), |done| String::from_utf8_lossy(&done.stdout).trim().to_owned())
}

/// As the demo's report names it.
fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|found| found.1.trim()));
    name.unwrap_or(std::env::consts::ARCH).to_owned()
}

struct Bench {
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    dialogues: Vec<Vec<Value>>,
}

impl Bench {
    fn new() -> Self {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
        let read = |name: &str| std::fs::read(models.join("airline-tiny").join(name)).expect("the model's file");
        let config = serde_json::from_slice(&read("tokenizer_config.json")).expect("JSON");
        let source = String::from_utf8(read("chat_template.jinja")).expect("text");
        let corpus = models.join("corpus/airline_dialogues.jsonl.gz");
        let unpacked = Command::new("gzip").arg("-dc").arg(corpus).output().expect("gzip");
        let lines = serde_json::Deserializer::from_slice(&unpacked.stdout).into_iter::<Value>();
        let dialogues = lines.map(|line| line.expect("a dialogue")["messages"].as_array().expect("a list").clone());
        Self {
            tokenizer: Arc::new(Tokenizer::from_json(&read("tokenizer.json")).expect("a tokenizer")),
            template: ChatTemplate::new(&source, &config).expect("a template"),
            dialogues: dialogues.collect(),
        }
    }

    fn text(&self, messages: &[Value]) -> String {
        let Parsed(messages) = serde_json::from_str(&Value::from(messages).to_string()).expect("JSON");
        self.template.render(items(&messages).expect("a list"), None).expect("renders")
    }

    fn whole(&self, messages: &[Value]) -> Vec<u32> {
        self.tokenizer.encode(&self.text(messages), false).expect("ids")
    }

    /// Dialogue after dialogue under one system message, to the user's message that fills the context, and the answer.
    fn first_turn(&self) -> (Vec<Value>, String) {
        let mut messages = vec![self.dialogues[0][0].clone()];
        for message in self.dialogues.iter().flatten().filter(|message| message["role"] != "system") {
            if message["role"] == "assistant"
                && let Some(answer) = message["content"].as_str().filter(|answer| !answer.is_empty())
                && self.whole(&messages).len() >= TOKENS
            {
                return (messages, answer.to_owned());
            }
            messages.push(message.clone());
        }
        panic!("the corpus is too small")
    }

    fn rounds(&self, messages: &[Value], answer: &str) -> (Vec<Part>, Vec<Duration>) {
        let split = self.tokenizer.split().expect("a tokenizer that can be split");
        let conversations = Arc::new(Conversations::default());
        let first = self.text(messages);
        let (prompt, turn) = conversations.encode(&self.tokenizer, split, &first).expect("ids");
        let mut turn = turn.expect("a turn");
        let generated = self.tokenizer.encode(answer, false).expect("ids");
        turn.push(&generated);
        turn.learn();
        let mut scheduler = scheduler(&[prompt, generated].concat());

        let mut parts: Vec<Part> = ["parse the body", "render the template", "text to ids", "tokens to decision"]
            .map(|name| (name, Vec::new()))
            .into();
        let mut alone = Vec::new();
        for round in 0..ROUNDS {
            let user = format!(
                "{round}. Thank you! Could you change flight HAT{round} to economy, and pay with my gift card?"
            );
            let mut messages = messages.to_vec();
            messages.push(json!({"role": "assistant", "content": answer}));
            messages.push(json!({"role": "user", "content": user}));
            let body = json!({"model": "airline-tiny", "messages": messages, "max_tokens": 256, "stream": true});
            let body = body.to_string().into_bytes();

            let mut clock = Instant::now();
            let mut lap = |part: usize| {
                let now = Instant::now();
                parts[part].1.push(now - std::mem::replace(&mut clock, now));
            };
            let chat = Chat::parse(black_box(&body)).expect("a chat");
            lap(0);
            let text = self.template.render(&chat.messages, None).expect("renders");
            lap(1);
            let (ids, _) = conversations.encode(&self.tokenizer, split, &text).expect("ids");
            lap(2);
            black_box(scheduler.route(Micros(1), &ids, ROOT));
            lap(3);
            if round == 0 {
                // Not in every round: it leaves a heap in pieces that the next would pay for.
                assert_eq!(ids, self.tokenizer.encode(&text, false).expect("ids"));
            }

            // Words that it has not seen either.
            let user = user.replace("HAT", "JFK");
            let new = format!("<|end|><|user|>{user}<|end|><|assistant|>");
            let start = Instant::now();
            black_box(self.tokenizer.encode(black_box(&new), false).expect("ids"));
            alone.push(start.elapsed());
        }
        (parts, alone)
    }

    /// The end of an answer, when its ids become a part of the conversation.
    fn learning(&self, answer: &str) -> Duration {
        let split = self.tokenizer.split().expect("a tokenizer that can be split");
        let ids = self.tokenizer.encode(&answer.repeat(ANSWER), false).expect("ids");
        let conversations = Arc::new(Conversations::default());
        let one = |_| {
            let turn = conversations.encode(&self.tokenizer, split, "<|user|>Hi<|end|><|assistant|>").expect("ids").1;
            let mut turn = turn.expect("a turn");
            turn.push(&ids[..ANSWER]);
            let start = Instant::now();
            turn.learn();
            start.elapsed()
        };
        median(&(0..ROUNDS).map(one).collect::<Vec<_>>())
    }
}

/// Workers of which each holds a larger part of a chain: every depth of a look-up is somewhere.
fn scheduler(ids: &[u32]) -> Scheduler {
    let size = BlockSize::new(16).expect("not zero");
    let model = ModelSpec { digest: "m".into(), tokenizer: "t".into(), block_size: size, vocab: 32_000 };
    let config =
        Config { policy: PolicyName::Product, mode: Mode::Slice, slice_len: Some(32), seed: 0, max_rows: 4096 };
    let mut scheduler = Scheduler::new(model.clone(), config);
    let chain = hash_blocks(ROOT, ids, size);
    let mut actions = Vec::new();
    for w in 0..WORKERS {
        let (worker, epoch) = (WorkerId(w), Epoch(1));
        let spec = WorkerSpec {
            name: format!("w{w}"),
            epoch,
            model: model.clone(),
            blocks: Blocks(100_000),
            max_rows: 64,
            max_context: Tokens(100_000),
            chunk: Tokens(512),
            layout: Layout::Paged,
            cost: None,
        };
        scheduler.handle(Micros(0), Event::WorkerJoined { worker, spec }, &mut actions);
        let hashes = chain[..chain.len() * (w as usize + 1) / WORKERS as usize].to_vec();
        let message = WorkerMessage::Snapshot { chunk: 0, last: true, hashes };
        scheduler.handle(Micros(0), Event::Worker { worker, epoch, seq: 1, message }, &mut actions);
    }
    scheduler
}

/// From a task of the runtime to its blocking pool and back.
fn hop() -> Duration {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let task = runtime.spawn(async {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let start = Instant::now();
            tokio::task::spawn_blocking(|| ()).await.expect("it ran");
            times.push(start.elapsed());
        }
        times
    });
    median(&runtime.block_on(task).expect("it ran"))
}

fn sums(parts: &[Part]) -> Vec<Duration> {
    (0..ROUNDS).map(|round| parts.iter().map(|(_, times)| times[round]).sum()).collect()
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times[times.len() / 2]
}

fn micros(time: Duration) -> String {
    format!("{:.1} us", time.as_secs_f64() * 1e6)
}
