//! One task per worker address: dial, learn who is there, hold a session, and again.
//!
//! Carries messages between a worker and its pool's dispatcher and watches that the worker lives. What the messages
//! mean is the core's.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use router_core::{ModelSpec, WorkerSpec};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tracing::{debug, error, info, warn};

use crate::convert::{self, Heard};
use crate::dispatch::{Command, LINK_MESSAGES, Seat};
use crate::fleet::{Admission, Fleet, Link};
use crate::pool::{Files, Pool};
use crate::proto::router_message::Body as ToWorker;
use crate::proto::worker_client::WorkerClient;
use crate::proto::worker_status::State;
use crate::proto::{GetInfoRequest, GetTokenizerRequest, Hello, Ping, RouterMessage, WorkerInfo, WorkerMessage};

/// Largest message in either direction.
pub const MOST_MESSAGE: usize = 16 << 20;
/// Most bytes of tokenizer and template files together.
const MOST_FILES: usize = 256 << 20;
const CONNECT: Duration = Duration::from_secs(2);
/// The process at the other end must answer HTTP/2 pings: one a second while nothing comes, each within a second. So
/// one that is stopped or cut off is lost within two seconds.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Its engine must answer ours. It does so between iterations, and a long prefill on a small machine takes seconds, so
/// this is a watch against hanging, not against dying.
const SILENCE: Duration = Duration::from_secs(60);
/// A session that lived this long did not fail at its start.
const HEALTHY: Duration = Duration::from_secs(10);
const PING: Duration = Duration::from_millis(500);
const BACKOFF: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];
/// A router that was displaced does not take the worker back while the other may live: two of them would take it from
/// each other for ever.
const DISPLACED: Duration = Duration::from_secs(30);
/// A refused worker is tried again, in case another takes its place: after the first, twice it, and so on to the last.
const REFUSED: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(60)];

/// Why a session is no more.
enum Ended {
    /// The worker cannot be reached or went away.
    Lost(String),
    /// Another router owns it.
    Displaced(String),
    /// It may not join, or what it said cannot be true.
    Refused(String),
}

impl Ended {
    fn lost(why: &impl ToString) -> Self {
        Self::Lost(why.to_string())
    }
}

/// Dials for ever; aborted from outside.
pub async fn run(link: Arc<Link>, fleet: Arc<Fleet>) {
    let mut backoff = BACKOFF[0];
    let mut refused = REFUSED[0];
    let mut told = String::new();
    loop {
        let mut opened = false;
        let began = Instant::now();
        let ended = session(&link, &fleet, &mut opened).await;
        link.tried();
        // A session that breaks at once is no reason for haste.
        if opened && began.elapsed() > HEALTHY {
            backoff = BACKOFF[0];
            refused = REFUSED[0];
        }
        let (state, why, pause) = match ended {
            Ended::Lost(why) => (State::Connecting, why, backoff),
            Ended::Refused(why) => (State::Refused, why, refused),
            Ended::Displaced(why) => {
                let why = format!(
                    "another router owns the worker: {why}\nIt is tried again every {} s: end one of the two routers.",
                    DISPLACED.as_secs()
                );
                (State::Refused, why, DISPLACED)
            }
        };
        let why = convert::clipped(&why);
        // Said once, not at every attempt.
        if told != why || opened {
            match state {
                State::Refused => error!(url = link.url, why, "worker refused"),
                _ if opened => warn!(url = link.url, why, "worker lost"),
                _ => info!(url = link.url, why, "worker not there yet"),
            }
            told.clone_from(&why);
        }
        link.note(|seen| {
            seen.state = state;
            seen.detail = why;
            seen.seat = None;
        });
        match state {
            State::Refused if pause == DISPLACED => {}
            State::Refused => refused = (refused * 2).min(REFUSED[1]),
            _ => backoff = (backoff * 2).min(BACKOFF[1]),
        }
        tokio::time::sleep(pause).await;
    }
}

/// One session from dialling to its end.
async fn session(link: &Arc<Link>, fleet: &Arc<Fleet>, opened: &mut bool) -> Ended {
    let attempt = async {
        let mut client = dial(&link.url).await?;
        let ask = client.get_info(GetInfoRequest {});
        let info = timeout(CONNECT, ask).await.map_err(|_| Ended::lost(&"no answer to GetInfo"))?;
        let info = info.map_err(|status| Ended::Lost(describe(&status)))?.into_inner();
        let spec = convert::worker_spec(&info).map_err(|hostile| Ended::Refused(hostile.to_string()))?;
        link.note(|seen| seen.info = Some(info.clone()));
        let pool = join_pool(link, fleet, &mut client, &info, &spec.model).await?;
        let spec = WorkerSpec { name: fleet.name_for(link, &info), ..spec };
        Ok((client, info, pool, spec))
    };
    match attempt.await {
        Err(ended) => ended,
        Ok((client, info, pool, spec)) => converse(link, client, &info, &pool, spec, opened).await,
    }
}

fn describe(status: &tonic::Status) -> String {
    format!("{:?}: {}", status.code(), convert::clipped(status.message()))
}

async fn dial(url: &str) -> Result<WorkerClient<Channel>, Ended> {
    let address = url.strip_prefix("grpc://").map_or_else(|| url.to_owned(), |rest| format!("http://{rest}"));
    let endpoint = Endpoint::from_shared(address).map_err(|error| Ended::Refused(format!("no address: {error}")))?;
    let endpoint = endpoint
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20);
    let channel = endpoint.connect().await.map_err(|error| {
        // The last cause says what is wrong: refused, timed out, no such host.
        let mut cause: &dyn std::error::Error = &error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        Ended::Lost(format!("cannot connect: {cause}"))
    })?;
    let client = WorkerClient::new(channel);
    Ok(client.max_decoding_message_size(MOST_MESSAGE).max_encoding_message_size(MOST_MESSAGE))
}

/// The pool this worker belongs to, made if it is the first.
async fn join_pool(
    link: &Link,
    fleet: &Fleet,
    client: &mut WorkerClient<Channel>,
    info: &WorkerInfo,
    model: &ModelSpec,
) -> Result<Arc<Pool>, Ended> {
    let admitted = |admission| match admission {
        Admission::Join(pool) => Ok(Some(pool)),
        Admission::Found => Ok(None),
        Admission::Differs(difference) => Err(Ended::Refused(difference)),
    };
    if let Some(pool) = admitted(fleet.admit(link, info, model))? {
        return Ok(pool);
    }
    let _turn = fleet.founding(link).await;
    if let Some(pool) = admitted(fleet.admit(link, info, model))? {
        return Ok(pool);
    }
    let files = timeout(Duration::from_secs(30), fetch_files(client)).await;
    let files = files.map_err(|_| Ended::lost(&"no answer to GetTokenizer"))??;
    fleet.found(info, model.clone(), files).await.map_err(Ended::Refused)
}

async fn fetch_files(client: &mut WorkerClient<Channel>) -> Result<Files, Ended> {
    let lost = |status: tonic::Status| Ended::Lost(describe(&status));
    let mut chunks = client.get_tokenizer(GetTokenizerRequest {}).await.map_err(lost)?.into_inner();
    let mut files = Files::new();
    let mut total = 0;
    while let Some(chunk) = chunks.message().await.map_err(lost)? {
        total += chunk.data.len();
        if total > MOST_FILES || files.len() > 16 {
            return Err(Ended::Refused("its tokenizer files are too large".into()));
        }
        files.entry(chunk.name).or_default().extend_from_slice(&chunk.data);
    }
    Ok(files)
}

/// Tells the dispatcher of the session's end, even if this task is aborted.
struct Place {
    commands: mpsc::Sender<Command>,
    seat: Option<Seat>,
}

impl Place {
    async fn leave(mut self) {
        if let Some(seat) = self.seat.take() {
            let _ = self.commands.send(Command::Lost(seat)).await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(seat) = self.seat.take()
            && let Err(mpsc::error::TrySendError::Full(command)) = self.commands.try_send(Command::Lost(seat))
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let commands = self.commands.clone();
            runtime.spawn(async move { commands.send(command).await });
        }
    }
}

/// Holds a session until it ends.
async fn converse(
    link: &Link,
    mut client: WorkerClient<Channel>,
    info: &WorkerInfo,
    pool: &Arc<Pool>,
    spec: WorkerSpec,
    opened: &mut bool,
) -> Ended {
    let (sender, receiver) = mpsc::channel(LINK_MESSAGES);
    let outgoing = outgoing(hello(info.worker_epoch), receiver);
    let stream = match timeout(CONNECT, client.session(outgoing)).await {
        Err(_) => return Ended::lost(&"no answer to Session"),
        Ok(Err(status)) => return Ended::Lost(describe(&status)),
        Ok(Ok(response)) => response.into_inner(),
    };
    let (answer, seat) = oneshot::channel();
    let (fate, mut fated) = oneshot::channel();
    let name = spec.name.clone();
    // From here on this task holds no sender to itself: the dispatcher drops the only one to end the session.
    let join = Command::Join { spec, link: sender, fate, seat: answer };
    if pool.commands.send(join).await.is_err() {
        return Ended::lost(&"its pool was replaced");
    }
    let Ok(seat) = seat.await else {
        return Ended::lost(&"its pool was replaced");
    };
    let place = Place { commands: pool.commands.clone(), seat: Some(seat) };
    *opened = true;
    link.tried();
    info!(url = link.url, worker = name, epoch = info.worker_epoch, "worker joined");
    link.note(|seen| {
        seen.detail.clear();
        seen.seat = Some((Arc::clone(pool), seat));
    });
    let ended = tokio::select! {
        ended = listen(stream, info, pool, seat) => ended,
        fate = &mut fated => match fate {
            Ok(why) => Ended::Refused(why),
            Err(_) => Ended::lost(&"the pool gave it up"),
        },
    };
    place.leave().await;
    ended
}

/// Carries the worker's messages to the dispatcher.
async fn listen(mut stream: tonic::Streaming<WorkerMessage>, info: &WorkerInfo, pool: &Pool, seat: Seat) -> Ended {
    loop {
        let message = match timeout_at(Instant::now() + SILENCE, stream.message()).await {
            Err(_) => return Ended::Lost(format!("silent for {} s", SILENCE.as_secs())),
            Ok(Err(status)) => return Ended::Lost(describe(&status)),
            Ok(Ok(None)) => return Ended::lost(&"the session ended"),
            Ok(Ok(Some(message))) => message,
        };
        if message.worker_epoch != info.worker_epoch {
            return Ended::Lost(format!("another epoch than announced: {}", message.worker_epoch));
        }
        let seq = message.state_seq;
        let Some(body) = message.body else {
            return Ended::Refused("a message without a body".into());
        };
        if let crate::proto::worker_message::Body::SliceReport(report) = &body
            && !report.error.is_empty()
        {
            error!(
                worker = info.worker_id,
                batch = report.batch,
                error = convert::clipped(&report.error),
                "a batch failed"
            );
        }
        match convert::heard(body, info.vocab_size) {
            Err(hostile) => return Ended::Refused(hostile.to_string()),
            Ok(Heard::Goodbye(reason)) => return Ended::Lost(format!("goodbye: {reason}")),
            Ok(Heard::NotOwner(detail)) => return Ended::Displaced(detail),
            Ok(Heard::Message(message)) => {
                let snapshot = matches!(message, router_core::WorkerMessage::Snapshot { .. });
                let command = Command::Message { seat, seq, message };
                if pool.commands.send(command).await.is_err() {
                    return Ended::lost(&"its pool was replaced");
                }
                if snapshot {
                    // One chunk at a time: a million blocks at once would keep the pool's other workers waiting.
                    pool.loads().await;
                }
            }
        }
    }
}

/// Numbers what the dispatcher sends, after the greeting, and pings in between. It ends when the dispatcher drops its
/// sender: that closes the session from our side.
fn outgoing(hello: Hello, mut receiver: mpsc::Receiver<ToWorker>) -> impl futures::Stream<Item = RouterMessage> {
    async_stream::stream! {
        let mut pings = interval(PING);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut nonce = 0;
        let mut cmd_seq = 1;
        yield RouterMessage { cmd_seq, body: Some(ToWorker::Hello(hello)) };
        loop {
            let body = tokio::select! {
                biased;
                body = receiver.recv() => match body {
                    Some(body) => body,
                    None => break,
                },
                _ = pings.tick() => {
                    nonce += 1;
                    ToWorker::Ping(Ping { nonce })
                }
            };
            cmd_seq += 1;
            debug!(cmd_seq, kind = kind(&body), "to worker");
            yield RouterMessage { cmd_seq, body: Some(body) };
        }
    }
}

fn kind(body: &ToWorker) -> &'static str {
    match body {
        ToWorker::Hello(_) => "hello",
        ToWorker::Plan(_) => "plan",
        ToWorker::Cut(_) => "cut",
        ToWorker::Drop(_) => "drop",
        ToWorker::ReleaseKv(_) => "release_kv",
        ToWorker::Resync(_) => "resync",
        ToWorker::Ping(_) => "ping",
    }
}

fn hello(worker_epoch: u64) -> Hello {
    Hello {
        router_id: router_id().to_owned(),
        owner_epoch: owner_epoch(),
        last_seq_seen: 0,
        worker_epoch,
        proto_minor: 0,
    }
}

/// Names this process among routers.
fn router_id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    ID.get_or_init(|| format!("router-{:016x}", RandomState::new().hash_one("router")))
}

/// Unix time in microseconds, always growing: a router that starts later takes over, and so does a later session.
fn owner_epoch() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
    let now = u64::try_from(now).unwrap_or(u64::MAX);
    let next = |last: u64| now.max(last + 1);
    LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(next(last))).map_or(now, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_epochs_grow() {
        let epochs: Vec<u64> = (0..1000).map(|_| owner_epoch()).collect();
        assert!(epochs.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[tokio::test]
    async fn the_greeting_comes_first_and_pings_go_on() {
        use futures::StreamExt;
        let (sender, receiver) = mpsc::channel(4);
        let mut stream = Box::pin(outgoing(hello(7), receiver));
        sender.try_send(ToWorker::Resync(crate::proto::Resync {})).expect("room");
        let mut kinds = Vec::new();
        for seq in 1..=4 {
            let message = stream.next().await.expect("more");
            assert_eq!(message.cmd_seq, seq);
            kinds.push(kind(message.body.as_ref().expect("a body")));
        }
        assert_eq!(kinds, ["hello", "resync", "ping", "ping"]);
        drop(sender);
        assert!(stream.next().await.is_none());
    }
}
