//! Serves HTTP on a listener: not for ever for a client that sends nothing, not more connections than there is room
//! for, and an end when told.

use std::io::{ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use futures::FutureExt;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

/// Connections of a listener at once; more wait in the system's queue.
pub const MOST_CONNECTIONS: usize = 4096;
/// Longest a client may take to send the head of a request, its first or a later one.
pub const HEAD_TIME: Duration = Duration::from_secs(30);

/// How often it is asked whether a client has closed its side.
const CLOSE_TICK: Duration = Duration::from_millis(250);

/// Accepts until told to stop, then lets the connections finish what they are at. Dropping it ends them.
pub async fn serve(listener: TcpListener, router: Router, stopped: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            // Never closed.
            let place = Arc::clone(&places).acquire_owned().await.ok();
            (accept(&listener).await, place)
        };
        tokio::select! {
            (stream, place) = accepted => {
                let connection = connection(stream, router.clone(), stopped.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Some(_) = connections.join_next() => {}
            () = told(stopped.clone()) => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Fails only for sockets that are closed already.
                let _ = stream.set_nodelay(true);
                return stream;
            }
            // These are of one connection, the others of the process: no file handles, no memory. They pass.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::ConnectionRefused | ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset
                ) => {}
            Err(error) => {
                warn!(%error, "cannot accept");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, router: Router, stopped: watch::Receiver<bool>) {
    // Set by the first request.
    let begun = AtomicBool::new(false);
    let service = TowerToHyperService::new(router);
    let service = service_fn(|request: Request<Incoming>| {
        begun.store(true, Ordering::Relaxed);
        service.call(request)
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIME);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(20));
    let stream = Arc::new(stream);
    let io = TokioIo::new(Shared(Arc::clone(&stream)));
    let mut serving = std::pin::pin!(builder.serve_connection(io, service));
    // The version of HTTP is read first, and no timer of hyper's watches that.
    let silent = async {
        sleep(HEAD_TIME).await;
        if begun.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = silent => return,
        () = left(&stream) => return,
        () = told(stopped) => {
            serving.as_mut().graceful_shutdown();
            // Those that have not sent a whole request by the end of the drain are dropped then.
            tokio::select! {
                ended = serving => ended,
                () = left(&stream) => return,
            }
        }
    };
    if let Err(error) = ended {
        debug!(%error, "connection");
    }
}

/// Ends a little after the client closed its side. hyper sees that too, but not while bytes lie unread behind a request:
/// of a client that pipelines it would only learn at the end of the answer.
async fn left(stream: &TcpStream) {
    let gone = || {
        let ready = stream.ready(Interest::READABLE).now_or_never();
        ready.is_some_and(|ready| ready.is_ok_and(Ready::is_read_closed))
    };
    loop {
        sleep(CLOSE_TICK).await;
        if gone() {
            // An answer that is on its way out gets there.
            sleep(CLOSE_TICK).await;
            return;
        }
    }
}

/// A stream that hyper has and [`left`] watches.
struct Shared(Arc<TcpStream>);

impl AsyncRead for Shared {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buf.initialize_unfilled()) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(|count| buf.advance(count))),
            }
        }
    }
}

impl AsyncWrite for Shared {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write_vectored(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(rustix::net::shutdown(&*self.0, rustix::net::Shutdown::Write).map_err(Into::into))
    }
}

/// Ends when told to stop.
pub async fn told(mut stopped: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is the end as well.
    let _ = stopped.wait_for(|stop| *stop).await;
}

/// Waits for the end of what is served, at most so long; then ends it. Whether it ended by itself.
pub async fn end_within<T: 'static>(servers: &mut JoinSet<T>, most: Duration) -> bool {
    let ended = timeout(most, async { while servers.join_next().await.is_some() {} }).await.is_ok();
    servers.abort_all();
    ended
}
