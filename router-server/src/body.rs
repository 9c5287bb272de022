//! Reads a request's body: not more than the limit, not for ever.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;

use crate::error::Error;

/// Longest a client may take to send its body.
const BODY_TIME: Duration = Duration::from_secs(60);

/// A page of another site can have a browser send texts and forms here unasked, but not JSON.
fn is_json(kind: &str) -> bool {
    kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

/// The whole body, or what is wrong with it.
pub async fn read(headers: &HeaderMap, body: Body, most: usize) -> Result<Bytes, Error> {
    let kind = headers.get(header::CONTENT_TYPE).map(|kind| kind.to_str().unwrap_or("not ASCII"));
    if let Some(other) = kind.filter(|kind| !is_json(kind)) {
        return Err(Error::ContentType(other.chars().take(64).collect()));
    }
    let encodings = headers.get_all(header::CONTENT_ENCODING).iter();
    if let Some(other) = encodings.into_iter().find(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(Error::ContentEncoding(other.to_str().unwrap_or("not ASCII").chars().take(64).collect()));
    }
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let mut left: usize = most;
    let mut too_large = declared.is_some_and(|length: usize| length > most);
    // A client that still writes would not read our answer: a body that is only a little too large is read to its end.
    let mut patience = most.saturating_mul(4).max(1 << 20);
    let mut whole = BytesMut::with_capacity(declared.unwrap_or(0).min(most).min(1 << 20));
    let mut chunks = body.into_data_stream();
    let reading = async {
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| Error::bad_request(format!("the body broke off: {error}")))?;
            too_large |= chunk.len() > left;
            if too_large {
                whole.clear();
                patience = patience.saturating_sub(chunk.len());
                if patience == 0 {
                    break;
                }
            } else {
                left -= chunk.len();
                whole.extend_from_slice(&chunk);
            }
        }
        Ok(())
    };
    match tokio::time::timeout(BODY_TIME, reading).await {
        Err(_) => Err(Error::SlowRequest),
        Ok(_) if too_large => Err(Error::TooLarge(most)),
        Ok(Err(error)) => Err(error),
        Ok(Ok(())) => Ok(whole.freeze()),
    }
}
