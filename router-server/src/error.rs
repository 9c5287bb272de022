//! What a client can be told went wrong, and how HTTP and gRPC say it.
//!
//! One enum for the whole shell. It knows status codes and the OpenAI error object; it does not know who asked.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use router_core::Rejection;
use serde_json::{Value, json};

use crate::convert::clipped;

/// The openai clients' word on whether to try again; it wins over the status.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// Who comes back sooner than in a few steps of a worker finds what was there.
const SOONEST: Duration = Duration::from_millis(100);
/// The openai clients heed a `Retry-After` of up to one minute or two, by version, and past that back off on their own or
/// give up; what is known of slices says nothing of a later time anyway, by when others have come and gone.
const LATEST: Duration = Duration::from_secs(60);

/// A failure that a client sees.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The request cannot be understood, or a value is out of range.
    #[error("{message}")]
    Invalid {
        /// For people.
        message: String,
        /// The field at fault, where it is one field.
        param: Option<String>,
    },
    /// A field that would change the answer and is not served.
    #[error("{message}")]
    Unsupported {
        /// For people.
        message: String,
        /// The field.
        param: String,
    },
    /// Prompt and limit pass what any worker takes.
    #[error("{message}")]
    ContextLength {
        /// For people.
        message: String,
        /// The field at fault.
        param: &'static str,
    },
    /// No pool serves this name.
    #[error("the model does not exist: {0}")]
    UnknownModel(String),
    /// The body is larger than the limit.
    #[error("the body is too large: more than {0} bytes")]
    TooLarge(usize),
    /// The body is of a type that is not JSON.
    #[error("the content-type is not supported: {0}\nsend application/json")]
    ContentType(String),
    /// The body is packed.
    #[error("the content-encoding is not supported: {0}\nsend the body as it is")]
    ContentEncoding(String),
    /// No API key, or a wrong one.
    #[error("{0}")]
    Unauthorized(&'static str),
    /// Not for those who ask from there.
    #[error("{0}")]
    Forbidden(&'static str),
    /// Nothing of the request was begun in time.
    #[error("the request waited longer than {} s to be begun", .0.as_secs_f64())]
    QueueTimeout(Duration),
    /// The client took too long to send its request.
    #[error("the request did not arrive in time")]
    SlowRequest,
    /// No worker can take the request now.
    #[error("no worker is ready")]
    NoWorker,
    /// The router is about to end.
    #[error("the router is shutting down")]
    Draining,
    /// Too much is waiting.
    #[error("too many requests are waiting")]
    Overloaded {
        /// When to come again.
        retry_after: Duration,
    },
    /// The worker, or the last of those that were tried, gave up on the request.
    #[error("a worker failed: {0}")]
    WorkerFailed(String),
    /// The client did not read its tokens fast enough.
    #[error("the client reads too slowly")]
    SlowClient,
    /// The request ran out of time.
    #[error("the request took longer than {} s", .0.as_secs())]
    Timeout(Duration),
    /// No such path.
    #[error("no such path: {0}")]
    NotFound(String),
    /// The path exists, not with this method.
    #[error("the method is not allowed here: {0}")]
    MethodNotAllowed(String),
    /// An endpoint of other servers.
    #[error("not offered by this server: {0}")]
    NotOffered(String),
    /// A bug of ours.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// A bad value of the field `param`.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: Some(param.into()) }
    }

    /// A bad request that is not the fault of one field.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: None }
    }

    /// The field `param` is not served, or not with this value.
    pub fn unsupported(param: impl Into<String>) -> Self {
        let param = param.into();
        Self::Unsupported { message: format!("not supported by this server: {param}"), param }
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Invalid { .. } | Self::Unsupported { .. } | Self::ContextLength { .. } => StatusCode::BAD_REQUEST,
            Self::UnknownModel(_) | Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::ContentType(_) | Self::ContentEncoding(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotOffered(_) => StatusCode::NOT_IMPLEMENTED,
            Self::QueueTimeout(_) | Self::SlowRequest | Self::SlowClient => StatusCode::REQUEST_TIMEOUT,
            Self::NoWorker | Self::Draining => StatusCode::SERVICE_UNAVAILABLE,
            Self::Overloaded { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::WorkerFailed(_) => StatusCode::BAD_GATEWAY,
            Self::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The twin of the status in gRPC.
    fn grpc_code(&self) -> tonic::Code {
        match self {
            Self::Invalid { .. }
            | Self::Unsupported { .. }
            | Self::ContextLength { .. }
            | Self::TooLarge(_)
            | Self::ContentType(_)
            | Self::ContentEncoding(_) => tonic::Code::InvalidArgument,
            Self::UnknownModel(_) | Self::NotFound(_) => tonic::Code::NotFound,
            Self::SlowRequest | Self::SlowClient => tonic::Code::Aborted,
            Self::NoWorker | Self::Draining | Self::WorkerFailed(_) => tonic::Code::Unavailable,
            Self::Overloaded { .. } | Self::QueueTimeout(_) => tonic::Code::ResourceExhausted,
            Self::Unauthorized(_) => tonic::Code::Unauthenticated,
            Self::Forbidden(_) => tonic::Code::PermissionDenied,
            Self::Timeout(_) => tonic::Code::DeadlineExceeded,
            Self::MethodNotAllowed(_) | Self::NotOffered(_) => tonic::Code::Unimplemented,
            Self::Internal(_) => tonic::Code::Internal,
        }
    }

    /// OpenAI's machine-readable code.
    fn code(&self) -> Option<&'static str> {
        Some(match self {
            Self::Invalid { .. } => return None,
            Self::Unsupported { .. } => "unsupported_parameter",
            Self::ContextLength { .. } => "context_length_exceeded",
            Self::UnknownModel(_) => "model_not_found",
            Self::TooLarge(_) => "body_too_large",
            Self::ContentType(_) => "unsupported_content_type",
            Self::ContentEncoding(_) => "unsupported_content_encoding",
            Self::Unauthorized(_) => "invalid_api_key",
            Self::Forbidden(_) => "forbidden",
            Self::NotOffered(_) => "not_offered",
            Self::QueueTimeout(_) => "queue_timeout",
            Self::SlowRequest | Self::Timeout(_) => "timeout",
            Self::NoWorker => "no_ready_worker",
            Self::Draining => "shutting_down",
            Self::Overloaded { .. } => "overloaded",
            Self::WorkerFailed(_) => "worker_failed",
            Self::SlowClient => "slow_client",
            Self::NotFound(_) => "not_found",
            Self::MethodNotAllowed(_) => "method_not_allowed",
            Self::Internal(_) => "internal_error",
        })
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid { param, .. } => param.as_deref(),
            Self::Unsupported { param, .. } => Some(param),
            Self::ContextLength { param, .. } => Some(param),
            Self::UnknownModel(_) => Some("model"),
            _ => None,
        }
    }

    /// After which time trying again makes sense, for errors that pass by themselves.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NoWorker | Self::Draining => Some(Duration::from_secs(1)),
            Self::Overloaded { retry_after } => Some((*retry_after).clamp(SOONEST, LATEST)),
            _ => None,
        }
    }

    /// The OpenAI error object.
    pub fn body(&self) -> Value {
        let status = self.status();
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            _ => "server_error",
        };
        // Both may quote what a client sent, which may be a body of any length.
        let (message, param, code) = (clipped(&self.to_string()), self.param().map(clipped), self.code());
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        if let Some(time) = self.retry_after() {
            // HTTP knows whole seconds.
            let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self, Self::NotOffered(_)) {
            // It will not be here the next time either, but clients take a status of 500 and above for a passing fault.
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if matches!(self, Self::Unauthorized(_)) {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let mut message = error.to_string();
        if let Some(param) = error.param().filter(|param| !message.contains(param)) {
            message = format!("{param}: {message}");
        }
        // A status travels in a header: a text of a client that it quotes must not make it too long to be read.
        let mut status = Self::new(error.grpc_code(), clipped(&message));
        // For programs, as HTTP's error object has it.
        for (key, value) in [("scls-code", error.code()), ("scls-field", error.param())] {
            if let Some(value) = value.and_then(|value| value.parse().ok()) {
                status.metadata_mut().insert(key, value);
            }
        }
        if let Some(time) = error.retry_after() {
            // gRPC clients read this as "not before": the server's push-back.
            let millis = u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX);
            status.metadata_mut().insert("grpc-retry-pushback-ms", millis.into());
        }
        status
    }
}

impl From<Rejection> for Error {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::NoWorker => Self::NoWorker,
            Rejection::NeverFits { .. } => Self::ContextLength { message: rejection.to_string(), param: "max_tokens" },
            Rejection::Overloaded { retry_after } => {
                Self::Overloaded { retry_after: Duration::from_micros(retry_after.0) }
            }
            Rejection::Empty => Self::invalid("prompt", rejection.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_openai_clients_expect() {
        let body = Error::unsupported("logit_bias").body();
        let error = &body["error"];
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["param"], "logit_bias");
        assert_eq!(error["code"], "unsupported_parameter");
        assert_eq!(Error::UnknownModel("x".into()).body()["error"]["code"], "model_not_found");
    }

    #[test]
    fn an_overload_says_when_the_first_worker_is_free() {
        for (micros, seconds, millis) in [
            (0, "1", "100"),
            (1, "1", "100"),
            (250_001, "1", "251"),
            (1_000_000, "1", "1000"),
            (1_000_001, "2", "1001"),
            (59_999_999, "60", "60000"),
            (3_600_000_000, "60", "60000"),
            (u64::MAX, "60", "60000"),
        ] {
            let error = Error::from(Rejection::Overloaded { retry_after: router_core::Micros(micros) });
            let pushback = tonic::Status::from(error.clone()).metadata().get("grpc-retry-pushback-ms").cloned();
            assert_eq!(pushback.expect("it has one"), millis, "{micros} us");
            let response = error.into_response();
            assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(response.headers()[header::RETRY_AFTER], seconds, "{micros} us");
        }
    }

    #[test]
    fn only_what_is_not_offered_is_not_to_be_tried_again() {
        let not_offered = Error::NotOffered("/v1/embeddings".into()).into_response();
        assert_eq!(
            (not_offered.status().as_u16(), &not_offered.headers()[SHOULD_RETRY]),
            (501, &HeaderValue::from_static("false"))
        );
        for error in [Error::NoWorker, Error::WorkerFailed("x".into()), Error::Internal("x".into()), Error::SlowRequest]
        {
            assert!(!error.into_response().headers().contains_key(SHOULD_RETRY));
        }
    }

    #[test]
    fn grpc_names_the_field() {
        let status = tonic::Status::from(Error::invalid("temperature", "between 0 and 2"));
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(status.message().starts_with("temperature"), "{}", status.message());
        assert_eq!(status.metadata().get("scls-field").expect("the field"), "temperature");
        assert!(status.metadata().get("scls-code").is_none());
    }

    #[test]
    fn what_a_client_sent_is_not_sent_back_whole() {
        for error in [Error::UnknownModel("m".repeat(1 << 20)), Error::unsupported("f".repeat(1 << 20))] {
            assert!(error.body().to_string().len() < 4096, "{}", error.status());
        }
    }

    #[test]
    fn grpc_says_no_more_than_a_header_takes() {
        let status = tonic::Status::from(Error::UnknownModel("é".repeat(100_000)));
        assert!(status.message().len() < 2000, "{}", status.message().len());
        assert_eq!(status.metadata().get("scls-code").expect("the code"), "model_not_found");
        // What no header can say is left out.
        assert!(tonic::Status::from(Error::invalid("a\nb", "no")).metadata().is_empty());
    }
}
