//! Who may ask: API keys of the public listeners, and the two headers that keep web pages away from the admin one.
//!
//! HTTP and gRPC both hand over header values; this knows neither. Keys are kept and compared as digests, each with
//! every one in the same time, so that an answer's time says nothing of a key.

use axum::http::uri::Authority;
use axum::http::{HeaderMap, Uri, Version, header};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::error::Error;

/// API keys; without any, everybody may ask.
#[derive(Clone, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// Reads keys separated by commas. The error does not repeat them.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let key = |key: &str| {
            if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err("an API key is of visible ASCII characters; several are separated by commas");
            }
            Ok(digest(key.as_bytes()))
        };
        text.split(',').map(|one| key(one.trim())).collect::<Result<_, _>>().map(Self)
    }

    /// Whether what stands in `authorization` names a key.
    pub fn check(&self, authorization: Option<&[u8]>) -> Result<(), Error> {
        if self.0.is_empty() {
            return Ok(());
        }
        let Some(given) = authorization else {
            return Err(Error::Unauthorized("the API key is missing\nsend it as authorization: Bearer KEY"));
        };
        let bearer = given.get(..7).filter(|scheme| scheme.eq_ignore_ascii_case(b"bearer "));
        if bearer.is_none() {
            return Err(Error::Unauthorized("the authorization is no API key\nsend it as authorization: Bearer KEY"));
        }
        let given = digest(given[7..].trim_ascii());
        let known = self.0.iter().fold(Choice::from(0), |known, key| known | key.ct_eq(&given));
        if known.into() { Ok(()) } else { Err(Error::Unauthorized("the API key is wrong")) }
    }
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// Whether a request on the loopback listener was meant for it. A page that had its own name point to this machine (DNS
/// rebinding) gives itself away by `host`, a page that simply asks by `origin`.
pub fn check_local(uri: &Uri, version: Version, headers: &HeaderMap) -> Result<(), Error> {
    let text = |name| headers.get(name).map(|value: &axum::http::HeaderValue| value.to_str().unwrap_or_default());
    let host = match version {
        Version::HTTP_2 => uri.authority().map(Authority::as_str),
        _ => text(header::HOST),
    };
    // Every browser names the host; a client too old to do so is none.
    if host.is_some_and(|host| !is_loopback(host)) {
        return Err(Error::Forbidden("the admin listener answers to localhost only: the host is another"));
    }
    let page = |origin: &str| origin.split_once("://").is_some_and(|(_, host)| is_loopback(host));
    if text(header::ORIGIN).is_some_and(|origin| !page(origin)) {
        return Err(Error::Forbidden("the admin listener answers to localhost only: the origin is another"));
    }
    Ok(())
}

/// Whether a host, with or without a port, is this machine by name or address.
fn is_loopback(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host();
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    !host.contains('@')
        && (name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_key_opens() {
        let keys = Keys::parse("alpha, beta").expect("two keys");
        for right in ["Bearer alpha", "bearer beta", "BEARER  alpha "] {
            keys.check(Some(right.as_bytes())).expect(right);
        }
        for wrong in
            ["", "alpha", "Bearer", "Bearer ", "Bearer alph", "Bearer alphaa", "Bearer alpha,beta", "Basic alpha"]
        {
            keys.check(Some(wrong.as_bytes())).expect_err(wrong);
        }
        keys.check(None).expect_err("no key");
        keys.check(Some(b"Bearer \xff")).expect_err("not text");
        Keys::default().check(None).expect("no keys are asked for");
    }

    #[test]
    fn keys_are_checked_and_not_repeated() {
        for wrong in ["", "a,", ",a", "a b", "sch\u{fc}ssel", "a\nb"] {
            let error = Keys::parse(wrong).err().expect(wrong);
            assert!(wrong.is_empty() || !error.contains(wrong) || wrong == "a,", "{error}");
        }
    }

    #[test]
    fn pages_of_others_are_told_apart() {
        let check = |host: Option<&str>, origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            for (name, value) in [(header::HOST, host), (header::ORIGIN, origin)] {
                value.map(|value| headers.insert(name, value.parse().expect("a value")));
            }
            check_local(&Uri::from_static("/workers"), Version::HTTP_11, &headers)
        };
        for host in ["localhost", "LOCALHOST:29000", "127.0.0.1:1", "127.1.2.3", "[::1]:29000"] {
            check(Some(host), None).expect(host);
            check(Some(host), Some(&format!("http://{host}"))).expect(host);
            check(Some(host), Some("https://evil.example")).expect_err(host);
            check(Some(host), Some("null")).expect_err(host);
        }
        check(None, None).expect("no browser");
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "0.0.0.0",
            "a@localhost",
            "10.0.0.1",
        ] {
            check(Some(host), None).expect_err(host);
        }
    }
}
