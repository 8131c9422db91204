//! The little that both ends of the Task API share: errors, connections, signals.

use std::io;
use std::time::Duration;
use ttrpc::proto::{Code, Status};

/// Signals as the Task API and the agent number them.
pub const SIGKILL: u32 = libc::SIGKILL as u32;
/// The polite one.
pub const SIGTERM: u32 = libc::SIGTERM as u32;
/// The exit code of whatever SIGKILL ended, or of a process whose guest is gone.
pub const KILLED: u32 = 128 + SIGKILL;

/// An error with a status code that containerd understands.
pub fn status(code: Code, message: impl ToString) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

/// The code and text of a failed call.
pub fn parts(error: &ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(Status { code, message, .. }) => {
            (code.enum_value_or_default(), message.clone())
        }
        other => (Code::UNAVAILABLE, other.to_string()),
    }
}

/// The error and its causes, fit for a terminal: guests, images and registries have a say in them.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    casemate_protocol::text::printable_lines(&text).into_owned()
}

/// Tells whoever reads a shim's log, who may be away or slow: then it is not told.
pub fn complain(error: impl std::fmt::Display) {
    use io::Write;
    let _ = writeln!(io::stderr(), "casemate shim: {error}");
}

/// containerd's own bound on identifiers and namespaces.
pub const MAX_ID: usize = 76;

/// Whether a text is an identifier as containerd has them: it becomes part of paths here and in the guest.
pub fn is_identifier(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// A call's context: `None` waits for ever.
pub fn context(timeout: Option<Duration>) -> ttrpc::context::Context {
    let nanoseconds = timeout.map_or(0, |t| i64::try_from(t.as_nanos()).unwrap_or(i64::MAX));
    ttrpc::context::with_timeout(nanoseconds)
}

/// Connects a ttrpc client to a Unix stream socket.
pub fn client(stream: std::os::unix::net::UnixStream) -> io::Result<ttrpc::r#async::Client> {
    stream.set_nonblocking(true)?;
    let stream = tokio::net::UnixStream::from_std(stream)?;
    Ok(ttrpc::r#async::Client::new(
        ttrpc::r#async::transport::Socket::from(stream),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_with_a_hostile_cause_is_printable() {
        let cause = io::Error::other("registry said \x1b]0;x\x07\u{9b}\u{202e}");
        let error = io::Error::other(cause);
        assert_eq!(chain(&error), r"registry said \u001b]0;x\u0007\u009b\u202e");
    }
}
