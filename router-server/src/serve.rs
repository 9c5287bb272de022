//! Serves until told to stop. Takes its listeners, its workers and its shutdown from the caller, so that tests and
//! production run the same function.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::metadata::MetadataValue;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::TcpIncoming;
use tonic_reflection::server::{v1, v1alpha};
use tracing::{info, warn};

use crate::accept::{self, end_within, told};
use crate::auth::Keys;
use crate::deadline;
use crate::fleet::Fleet;
use crate::grpc::Service;
use crate::http::{self, App};
use crate::link::MOST_MESSAGE;
use crate::proto::router_server::RouterServer;

/// Longest that requests that generate may take to finish after a shutdown begins.
pub const DRAIN: Duration = Duration::from_secs(30);
/// After that: for what is written already to leave, and for those who have said nothing worth waiting for.
const GRACE: Duration = Duration::from_millis(500);
/// Calls of one gRPC connection at once; a client's further ones wait there.
const MOST_STREAMS: u32 = 1024;
/// What reflection lists and health reports.
const SERVICE: &str = "scls.v1.Router";
const DESCRIPTOR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/scls_descriptor.bin"));

/// Bound sockets.
pub struct Listeners {
    /// The OpenAI side.
    pub http: TcpListener,
    /// The contract's `Router` service.
    pub grpc: TcpListener,
    /// Metrics and, later, administration.
    pub admin: TcpListener,
}

/// Why serving failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A listener broke.
    #[error("listener: {0}")]
    Listener(#[from] std::io::Error),
    /// The gRPC server broke.
    #[error("grpc: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// The descriptor in the binary is broken.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves the fleet until `shutdown`, then lets requests that generate finish for up to [`DRAIN`]. The fleet's links are
/// closed at the end.
pub async fn serve(
    fleet: Arc<Fleet>,
    most_payload: usize,
    keys: Keys,
    listeners: Listeners,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let app = Arc::new(App::new(Arc::clone(&fleet), most_payload, keys));
    let (stop, stopped) = watch::channel(false);
    // Admin answers to the very end, so that a drain can be watched.
    let (stop_admin, admin_stopped) = watch::channel(false);
    let mut servers = JoinSet::new();
    let public = accept::serve(listeners.http, http::public(Arc::clone(&app)), stopped.clone());
    servers.spawn(async move {
        public.await;
        Ok::<_, ServeError>(())
    });
    servers.spawn(grpc(Arc::clone(&app), listeners.grpc, stopped));
    let admin = tokio::spawn(accept::serve(listeners.admin, http::admin(Arc::clone(&app)), admin_stopped));

    let mut result = Ok(());
    tokio::select! {
        () = shutdown => info!(
            "shutting down: requests that run have {} s; a second signal ends them at once",
            DRAIN.as_secs()
        ),
        Some(ended) = servers.join_next() => {
            result = ended.unwrap_or_else(|error| Err(std::io::Error::other(error).into()));
        }
    }
    app.drain();
    let _ = stop.send(true);
    if tokio::time::timeout(DRAIN, app.idle()).await.is_err() {
        warn!("requests were still running after {} s", DRAIN.as_secs());
    }
    end_within(&mut servers, GRACE).await;
    let _ = stop_admin.send(true);
    admin.abort();
    fleet.close();
    result
}

/// The contract's files are in it whole; listed is what is served beside health: `service`.
fn descriptors(service: &'static str) -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTOR)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(service)
        .with_service_name("grpc.health.v1.Health")
}

type Reflected<T> = Result<T, tonic_reflection::server::Error>;

/// Reflection as it is today.
pub(crate) fn reflection(service: &'static str) -> Reflected<v1::ServerReflectionServer<impl v1::ServerReflection>> {
    descriptors(service).build_v1()
}

/// Reflection as older clients ask for it.
pub(crate) fn reflection_alpha(
    service: &'static str,
) -> Reflected<v1alpha::ServerReflectionServer<impl v1alpha::ServerReflection>> {
    descriptors(service).build_v1alpha()
}

async fn grpc(app: Arc<App>, listener: TcpListener, stopped: watch::Receiver<bool>) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let watching = tokio::spawn(report_health(Arc::clone(&app), health));
    let service = RouterServer::new(Service::new(Arc::clone(&app)));
    let service = service.max_decoding_message_size(MOST_MESSAGE).max_encoding_message_size(MOST_MESSAGE);
    // Health and reflection are open, as they are over HTTP.
    let service = InterceptedService::new(service, move |request: tonic::Request<()>| {
        let given = request.metadata().get("authorization").map(MetadataValue::as_bytes);
        app.keys.check(given)?;
        Ok(request)
    });
    let routes = Routes::new(service)
        .add_service(health_service)
        .add_service(reflection(SERVICE)?)
        .add_service(reflection_alpha(SERVICE)?)
        .into_axum_router()
        .layer(axum::middleware::from_fn(deadline::keep));
    let served = tonic::transport::Server::builder()
        // Clients may ping as they like: nothing here counts their pings.
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(Some(MOST_STREAMS))
        .add_routes(Routes::from(routes))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), told(stopped))
        .await;
    watching.abort();
    Ok(served?)
}

/// Keeps `grpc.health.v1` at what `/ready` says.
async fn report_health(app: Arc<App>, health: tonic_health::server::HealthReporter) {
    use tonic_health::ServingStatus::{NotServing, Serving};
    let mut last = None;
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    loop {
        ticks.tick().await;
        let ready = app.is_ready();
        if last.replace(ready) != Some(ready) {
            let status = if ready { Serving } else { NotServing };
            for name in ["", SERVICE] {
                health.set_service_status(name, status).await;
            }
        }
    }
}
