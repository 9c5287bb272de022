//! `scls-router health`: asks a running router or worker, as a container's health check does. Needs no curl.

use std::net::IpAddr;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::cli::{HealthArgs, HttpArgs};

/// An answer of these routes has a few words.
const MOST_ANSWER: usize = 64 << 10;

/// What to print if it is ready; the error says why it is not.
pub async fn ask(args: &HealthArgs) -> Result<String, String> {
    let url = args.url.clone().unwrap_or_else(|| local_url(&args.http));
    let asked = async {
        match url.split_once("://") {
            Some(("grpc", address)) => ask_grpc(address).await,
            Some((_, address)) => ask_http(address).await,
            None => Err("it has no scheme".into()),
        }
    };
    let asked = tokio::time::timeout(Duration::from_secs(args.timeout_secs), asked).await;
    match asked.unwrap_or_else(|_| Err(format!("no answer within {} s", args.timeout_secs))) {
        Ok(()) => Ok(format!("ready: {url}")),
        // Whoever answers there may say anything: a terminal is to show it, not to obey it.
        Err(why) => Err(format!("not ready: {url}: {}", why.replace(char::is_control, "?"))),
    }
}

/// Where a router with these settings is reached from its own machine.
fn local_url(http: &HttpArgs) -> String {
    let host = match http.host.parse() {
        Ok(IpAddr::V4(address)) if address.is_unspecified() => "127.0.0.1".to_owned(),
        Ok(IpAddr::V6(address)) if address.is_unspecified() => "[::1]".to_owned(),
        Ok(IpAddr::V6(address)) => format!("[{address}]"),
        _ => http.host.clone(),
    };
    format!("http://{host}:{}", http.port)
}

async fn ask_http(address: &str) -> Result<(), String> {
    let (status, body) = get(address, "/ready").await?;
    if status == StatusCode::OK {
        return Ok(());
    }
    let (alive, _) = get(address, "/health").await?;
    let what = if alive == StatusCode::OK { "it is alive" } else { "it is not healthy" };
    let why =
        serde_json::from_slice(&body).ok().and_then(|body: Value| Some(body["error"]["message"].as_str()?.into()));
    Err(format!(
        "{what}, but /ready answers {}: {}",
        status.as_u16(),
        why.unwrap_or_else(|| "no reason given".to_owned())
    ))
}

async fn get(address: &str, path: &str) -> Result<(StatusCode, Vec<u8>), String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let stream = TcpStream::connect(address).await.map_err(|error| text(&error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| text(&error))?;
    // Ends with the sender.
    tokio::spawn(connection);
    let request = Request::get(path).header(header::HOST, address).body(Body::empty());
    let answer = sender.send_request(request.map_err(|error| text(&error))?).await.map_err(|error| text(&error))?;
    let status = answer.status();
    let body = to_bytes(Body::new(answer.into_body()), MOST_ANSWER).await.map_err(|error| text(&error))?;
    Ok((status, body.into()))
}

/// A router or a worker: both serve `grpc.health.v1`.
async fn ask_grpc(address: &str) -> Result<(), String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| error.to_string())?;
    // tonic's own error says "transport error"; what went wrong is below it.
    let channel = endpoint.connect().await.map_err(|error| innermost(&error))?;
    let answer = HealthClient::new(channel).check(HealthCheckRequest { service: String::new() }).await;
    let answer = answer.map_err(|status| format!("{:?}: {}", status.code(), status.message()))?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        status => Err(status.as_str_name().to_owned()),
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), innermost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_router_on_all_addresses_is_asked_on_loopback() {
        let url = |host: &str| local_url(&HttpArgs { host: host.into(), port: 7 });
        for (host, expected) in [
            ("0.0.0.0", "http://127.0.0.1:7"),
            ("::", "http://[::1]:7"),
            ("fe80::1", "http://[fe80::1]:7"),
            ("10.0.0.1", "http://10.0.0.1:7"),
            ("router.local", "http://router.local:7"),
        ] {
            assert_eq!(url(host), expected);
        }
    }
}
