//! Times that gRPC calls have. At its `grpc-timeout` an answer ends with `DEADLINE_EXCEEDED`, and what made it is
//! dropped: tonic itself watches only until the answer begins. And a request may not arrive for ever.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures::Stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as _, Frame};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::error::Error;

/// Longest a client may take to send its request, as over HTTP.
const ARRIVAL: Duration = Duration::from_secs(60);
/// All methods of this service take one request; of others it may be a stream that is open for long.
const ONE_REQUEST: &str = "/scls.v1.Router/";

/// Passes a call on and ends it in time.
pub async fn keep(request: Request, next: Next) -> Response {
    let request = if request.uri().path().starts_with(ONE_REQUEST) {
        request.map(|body| Body::new(StreamBody::new(arriving(body, Instant::now() + ARRIVAL))))
    } else {
        request
    };
    let Some(most) = timeout_of(request.headers()) else {
        return next.run(request).await;
    };
    let Some(deadline) = Instant::now().checked_add(most) else {
        return next.run(request).await;
    };
    match timeout_at(deadline, next.run(request)).await {
        Err(_) => exceeded(most).into_http(),
        // An answer that is its head alone must stay so.
        Ok(response) if response.body().is_end_stream() => response,
        Ok(response) => response.map(|body| Body::new(StreamBody::new(limited(body, deadline, most)))),
    }
}

fn exceeded(most: Duration) -> Status {
    Status::deadline_exceeded(format!("the call took longer than its deadline of {} ms", most.as_millis()))
}

fn arriving(mut body: Body, deadline: Instant) -> impl Stream<Item = Result<Frame<Bytes>, axum::Error>> + Send {
    async_stream::stream! {
        loop {
            match timeout_at(deadline, body.frame()).await {
                Ok(Some(frame)) => yield frame,
                Ok(None) => break,
                Err(_) => {
                    // tonic answers with the status it finds in the error.
                    yield Err(axum::Error::new(Status::from(Error::SlowRequest)));
                    break;
                }
            }
        }
    }
}

fn limited(
    mut body: Body,
    deadline: Instant,
    most: Duration,
) -> impl Stream<Item = Result<Frame<Bytes>, axum::Error>> + Send {
    async_stream::stream! {
        loop {
            match timeout_at(deadline, body.frame()).await {
                Ok(Some(frame)) => yield frame,
                Ok(None) => break,
                Err(_) => {
                    // First what makes the answer, so that it ends even for a client that does not read this.
                    drop(body);
                    let mut trailers = HeaderMap::new();
                    if exceeded(most).add_header(&mut trailers).is_ok() {
                        yield Ok(Frame::trailers(trailers));
                    }
                    break;
                }
            }
        }
    }
}

/// At most eight digits and a unit. What is anything else is no deadline.
fn timeout_of(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt, TryStreamExt};

    use super::*;

    #[tokio::test]
    async fn a_request_that_stalls_is_ended_and_one_that_comes_is_passed_on() {
        let soon = || Instant::now() + Duration::from_millis(50);
        let whole: Vec<_> = arriving(Body::from("all of it"), soon()).try_collect().await.expect("no error");
        assert_eq!(whole.into_iter().map(|frame| frame.into_data().expect("data")).collect::<Vec<_>>(), ["all of it"]);
        let begun = futures::stream::iter([Ok::<_, axum::Error>("half")]);
        let stalled = Body::from_stream(begun.chain(futures::stream::pending()));
        let mut frames: Vec<_> = arriving(stalled, soon()).collect().await;
        assert_eq!(frames.len(), 2);
        let error = frames.pop().expect("the last").expect_err("no more came");
        assert_eq!(Status::from_error(error.into()).code(), tonic::Code::Aborted);
    }

    #[test]
    fn deadlines_are_read_as_the_protocol_writes_them() {
        let read = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", value.parse().expect("a header"));
            timeout_of(&headers)
        };
        for (value, want) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("99999999m", Duration::from_millis(99_999_999)),
            ("5u", Duration::from_micros(5)),
            ("0n", Duration::ZERO),
        ] {
            assert_eq!(read(value), Some(want), "{value}");
        }
        for value in ["", "S", "5", "-5S", "+5S", "100000000S", "5s", "5 S", "99999999999999999999H"] {
            assert_eq!(read(value), None, "{value}");
        }
    }
}
