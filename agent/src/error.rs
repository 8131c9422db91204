//! The agent's one error: a kind that becomes a ttrpc status code, and a text that names the values.
//!
//! It also travels from a forked child to the agent, so it is plain data.

use std::io;

/// What went wrong, as far as the caller must tell cases apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A system call failed or the guest lacks something.
    Internal = 0,
    /// No such executable, container or process.
    NotFound = 1,
    /// The executable exists but can't be executed.
    Denied = 2,
    /// The request breaks a rule.
    Invalid = 3,
    /// The spec asks for something a guest can't apply.
    Unsupported = 4,
    /// The id is in use.
    Exists = 5,
    /// The container is not in the state that the call needs.
    State = 6,
}

/// An error of the agent.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct Error {
    /// Decides the status code.
    pub kind: Kind,
    /// Says what failed, with values.
    pub text: String,
}

/// Result with the agent's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` that says `text`.
    pub fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, text)
    }

    pub(crate) fn unsupported(text: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, text)
    }

    /// The bytes that a child sends its parent.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.kind as u8];
        bytes.extend_from_slice(self.text.as_bytes());
        bytes
    }

    /// The inverse of [`Error::to_bytes`], for any bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let (kind, text) = bytes
            .split_first()
            .map_or((0, &[][..]), |(kind, text)| (*kind, text));
        let kind = match kind {
            1 => Kind::NotFound,
            2 => Kind::Denied,
            3 => Kind::Invalid,
            4 => Kind::Unsupported,
            5 => Kind::Exists,
            6 => Kind::State,
            _ => Kind::Internal,
        };
        Self::new(kind, String::from_utf8_lossy(text))
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match error.kind {
            Kind::Internal => ttrpc::Code::INTERNAL,
            Kind::NotFound => ttrpc::Code::NOT_FOUND,
            Kind::Denied => ttrpc::Code::PERMISSION_DENIED,
            Kind::Invalid => ttrpc::Code::INVALID_ARGUMENT,
            Kind::Unsupported => ttrpc::Code::UNIMPLEMENTED,
            Kind::Exists => ttrpc::Code::ALREADY_EXISTS,
            Kind::State => ttrpc::Code::FAILED_PRECONDITION,
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.text))
    }
}

/// Adds what was attempted to a failed system call.
pub(crate) trait Attempt<T> {
    /// On failure: `what: <the system's text>`.
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Attempt<T> for std::result::Result<T, E> {
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| {
            let error: io::Error = error.into();
            Error::new(Kind::Internal, format!("{}: {}", what(), plain(&error)))
        })
    }
}

/// The system's text in lower case without Rust's "(os error 2)".
pub(crate) fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_ascii_lowercase());
    first.into_iter().chain(chars).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_keeps_kind_and_text() {
        let error = Error::new(Kind::Denied, "exec: \"/x\": permission denied");
        let back = Error::from_bytes(&error.to_bytes());
        assert_eq!((back.kind, back.text), (error.kind, error.text));
    }

    #[test]
    fn from_bytes_with_garbage_is_internal() {
        assert_eq!(Error::from_bytes(&[]).kind, Kind::Internal);
        assert_eq!(Error::from_bytes(&[200, 0xff, 0xfe]).kind, Kind::Internal);
    }

    #[test]
    fn attempt_failed_call_names_action_and_reason() {
        let error = rustix::fs::stat("/nonexistent")
            .attempt(|| "stat /nonexistent".into())
            .unwrap_err();
        assert_eq!(error.text, "stat /nonexistent: no such file or directory");
    }
}
