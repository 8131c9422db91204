//! Answers to a registry's challenge: a password, or a token that its token server gives for credentials.
//!
//! The ways are those of the distribution project's token documents: a GET with or without a password, and for a refresh token
//! (what `docker login` keeps as an identity token) OAuth 2's POST.

use reqwest::Url;
use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};
use serde::Deserialize;

use super::auth::Credentials;

/// What goes with a request.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Access {
    Basic(String, String),
    Bearer(String),
}

/// A way to access that the registry offers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: Url, service: Option<String> },
}

/// What a token server says.
#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The registry's challenge that we can answer; tokens come before passwords.
pub(super) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let texts: Vec<&str> = headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .collect();
    let offered: Vec<_> = texts
        .iter()
        .filter_map(|text| http_auth::parse_challenges(text).ok())
        .flatten()
        .collect();
    let of = |scheme: &str| {
        offered
            .iter()
            .find(|offer| offer.scheme.eq_ignore_ascii_case(scheme))
    };
    let bearer = of("bearer").and_then(|offer| {
        let parameter = |name: &str| {
            let found = offer
                .params
                .iter()
                .find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        let realm = Url::parse(&parameter("realm")?).ok()?;
        matches!(realm.scheme(), "http" | "https").then(|| Challenge::Bearer {
            realm,
            service: parameter("service"),
        })
    });
    bearer.or_else(|| of("basic").map(|_| Challenge::Basic))
}

/// The request that a token is asked for with.
pub(super) fn request(
    http: &reqwest::Client,
    realm: &Url,
    service: Option<&str>,
    repository: &str,
    credentials: &Credentials,
) -> reqwest::RequestBuilder {
    let scope = format!("repository:{repository}:pull");
    let mut fields = vec![("scope", scope.as_str())];
    fields.extend(service.map(|service| ("service", service)));
    match credentials {
        Credentials::Refresh(token) => {
            fields.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "casemate"),
                ("refresh_token", token),
            ]);
            http.post(realm.clone()).form(&fields)
        }
        Credentials::Basic(user, password) => http
            .get(realm.clone())
            .query(&fields)
            .basic_auth(user, Some(password)),
        Credentials::Anonymous | Credentials::Bearer(_) => http.get(realm.clone()).query(&fields),
    }
}

/// The token in a token server's answer; it must fit a header.
pub(super) fn token(answer: &[u8]) -> Option<String> {
    let answer: Answer = serde_json::from_slice(answer).ok()?;
    [answer.token, answer.access_token]
        .into_iter()
        .flatten()
        .find(|token| !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge_of(texts: &[&'static str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for text in texts {
            headers.append(WWW_AUTHENTICATE, text.parse().unwrap());
        }
        challenge(&headers)
    }

    #[test]
    fn challenge_bearer_comes_before_basic() {
        let bearer = r#"Bearer realm="https://a.io/t?x=1",service="r,\"q\"",scope="s""#;
        let expected = Challenge::Bearer {
            realm: Url::parse("https://a.io/t?x=1").unwrap(),
            service: Some("r,\"q\"".into()),
        };
        assert_eq!(challenge_of(&["Basic realm=\"x\"", bearer]), Some(expected));
        assert_eq!(challenge_of(&["BASIC realm=x"]), Some(Challenge::Basic));
    }

    #[test]
    fn challenge_of_nonsense_is_none() {
        for text in [
            "",
            "Bearer",
            "Bearer realm=\"\"",
            "Bearer realm=\"file:///etc/passwd\"",
            "Bearer realm=\"/token\"",
            "Negotiate",
            "=,;\"",
        ] {
            assert_eq!(challenge_of(&[text]), None, "{text}");
        }
    }

    #[test]
    fn token_by_either_name_and_only_if_it_fits_a_header() {
        assert_eq!(token(br#"{"token":"a"}"#).as_deref(), Some("a"));
        assert_eq!(
            token(br#"{"token":"","access_token":"b"}"#).as_deref(),
            Some("b")
        );
        for text in [
            "",
            "{}",
            r#"{"token":1}"#,
            r#"{"token":"a\r\nX: y"}"#,
            r#"{"token":"\u001b"}"#,
        ] {
            assert_eq!(token(text.as_bytes()), None, "{text}");
        }
    }
}
