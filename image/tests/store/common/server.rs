//! A registry on loopback that can be told to misbehave.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::images::Blobs;

/// What goes wrong, and with which blob.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fault {
    /// Sends so many bytes, then closes.
    Cut(usize),
    /// Flips a byte.
    Corrupt,
    /// Sends so many bytes, then nothing.
    Stall(usize),
    /// Waits so many milliseconds after each 64 KiB.
    Slow(u64),
    /// Answers with this status.
    Status(u16),
    /// Sends more than it should.
    Longer,
    /// Answers with this status and body.
    Say(u16, String),
    /// Waits so many milliseconds after each byte.
    Drip(u64),
    /// Sends the whole world there.
    Redirect(String),
}

#[derive(Default)]
struct State {
    tags: HashMap<String, String>,
    blobs: HashMap<String, Vec<u8>>,
    faults: HashMap<String, Fault>,
    /// Faults that vanish once they were met.
    once: bool,
    /// Requests by path.
    requests: HashMap<String, usize>,
    ranges: bool,
    password: Option<String>,
    tokens: bool,
    /// The token server's answer to a refresh token, and what it was asked with.
    refresh: Option<(String, u16, Vec<u8>)>,
    asked: Vec<String>,
}

/// The server; it ends with the test.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) address: String,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: listener.local_addr().unwrap().to_string(),
            state: Arc::new(Mutex::new(State {
                ranges: true,
                ..State::default()
            })),
            stop: Arc::default(),
        };
        let this = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if this.stop.load(Ordering::Relaxed) {
                    return;
                }
                let this = this.clone();
                std::thread::spawn(move || {
                    let _ = this.serve(stream.unwrap());
                });
            }
        });
        server
    }

    /// Serves `image` as `app:TAG`.
    pub(crate) fn add(&self, tag: &str, image: &Blobs) -> String {
        let mut state = self.state.lock().unwrap();
        state.tags.insert(tag.to_owned(), image.manifest.clone());
        state.blobs.extend(image.blobs.clone());
        format!("{}/app:{tag}", self.address)
    }

    pub(crate) fn fault(&self, digest_or_tag: &str, fault: Fault) {
        self.state
            .lock()
            .unwrap()
            .faults
            .insert(digest_or_tag.to_owned(), fault);
    }

    pub(crate) fn fault_once(&self, digest_or_tag: &str, fault: Fault) {
        self.fault(digest_or_tag, fault);
        self.state.lock().unwrap().once = true;
    }

    pub(crate) fn mend(&self) {
        self.state.lock().unwrap().faults.clear();
    }

    pub(crate) fn without_ranges(&self) {
        self.state.lock().unwrap().ranges = false;
    }

    /// Asks for a password, or with `tokens` for a token that the password gets.
    pub(crate) fn protect(&self, password: &str, tokens: bool) {
        let mut state = self.state.lock().unwrap();
        (state.password, state.tokens) = (Some(password.to_owned()), tokens);
    }

    /// Gives tokens for this refresh token alone.
    pub(crate) fn protect_by_refresh_token(&self, token: &str) {
        self.protect("nobody has this", true);
        let answer = br#"{"access_token":"t0ken","expires_in":300}"#;
        self.answer_refresh_token(token, 200, answer);
    }

    /// Gives this answer for a refresh token.
    pub(crate) fn answer_refresh_token(&self, token: &str, status: u16, answer: &[u8]) {
        self.state.lock().unwrap().refresh = Some((token.to_owned(), status, answer.to_vec()));
    }

    /// Forms that the token server was sent.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.state.lock().unwrap().asked.clone()
    }

    /// How often a blob or manifest was asked for.
    pub(crate) fn requests(&self, digest_or_tag: &str) -> usize {
        let state = self.state.lock().unwrap();
        state
            .requests
            .iter()
            .filter(|(path, _)| path.ends_with(digest_or_tag))
            .map(|(_, count)| count)
            .sum()
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut out = stream;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let path = line.split(' ').nth(1).unwrap_or_default();
            let path = if path.starts_with("/token") {
                path
            } else {
                path.split('?').next().unwrap_or_default()
            }
            .to_owned();
            let mut headers = HashMap::new();
            loop {
                let mut line = String::new();
                reader.read_line(&mut line)?;
                let Some((key, value)) = line.trim().split_once(": ") else {
                    break;
                };
                headers.insert(key.to_ascii_lowercase(), value.to_owned());
            }
            let length = headers.get("content-length").and_then(|v| v.parse().ok());
            let mut form = vec![0; length.unwrap_or(0)];
            std::io::Read::read_exact(&mut reader, &mut form)?;
            if !form.is_empty() {
                let form = String::from_utf8_lossy(&form).into_owned();
                self.state.lock().unwrap().asked.push(form.clone());
                headers.insert(":form".to_owned(), form);
            }
            if !self.answer(&path, &headers, &mut out)? {
                return Ok(());
            }
        }
    }

    /// Answers one request; false if the connection must end.
    fn answer(
        &self,
        path: &str,
        headers: &HashMap<String, String>,
        out: &mut TcpStream,
    ) -> std::io::Result<bool> {
        let (status, extra, body, fault, offset) = {
            let mut state = self.state.lock().unwrap();
            *state.requests.entry(path.to_owned()).or_default() += 1;
            let authorization = headers.get("authorization").cloned().unwrap_or_default();
            let name = path.rsplit('/').next().unwrap_or_default().to_owned();
            if let Some(password) = state.password.clone() {
                let address = &self.address;
                let (wanted, challenge) = if state.tokens {
                    (
                        "Bearer t0ken".to_owned(),
                        format!("Bearer realm=\"http://{address}/token\",service=\"test\""),
                    )
                } else {
                    (
                        format!("Basic {password}"),
                        "Basic realm=\"test\"".to_owned(),
                    )
                };
                if path.starts_with("/token")
                    && let Some((token, status, body)) = &state.refresh
                    && let Some(form) = headers.get(":form")
                {
                    let good = form.contains(&format!("refresh_token={token}&"))
                        || form.ends_with(&format!("refresh_token={token}"));
                    return if good {
                        respond(out, *status, "", body).map(|()| true)
                    } else {
                        let body = br#"{"error":"invalid_grant"}"#;
                        respond(out, 400, "", body).map(|()| true)
                    };
                }
                if path.starts_with("/token") {
                    let good = authorization == format!("Basic {password}");
                    let body = if good {
                        &br#"{"token":"t0ken","expires_in":300}"#[..]
                    } else {
                        b"{}"
                    };
                    return respond(out, if good { 200 } else { 401 }, "", body).map(|()| true);
                }
                if authorization != wanted {
                    let extra = format!("WWW-Authenticate: {challenge}\r\n");
                    return respond(
                        out,
                        401,
                        &extra,
                        br#"{"errors":[{"code":"UNAUTHORIZED","message":"who are you?"}]}"#,
                    )
                    .map(|()| true);
                }
            }
            if path == "/v2/" {
                return respond(out, 200, "", b"{}").map(|()| true);
            }
            let digest = state.tags.get(&name).cloned().unwrap_or(name.clone());
            let fault = state.faults.get(&name).cloned();
            if state.once {
                state.faults.remove(&name);
            }
            let Some(body) = state.blobs.get(&digest).cloned() else {
                let body =
                    br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
                return respond(out, 404, "", body).map(|()| true);
            };
            let range = headers
                .get("range")
                .filter(|_| state.ranges && path.contains("/blobs/"));
            let offset = range.and_then(|range| {
                range
                    .strip_prefix("bytes=")?
                    .strip_suffix('-')?
                    .parse::<usize>()
                    .ok()
            });
            let mut extra = format!("Docker-Content-Digest: {digest}\r\n");
            let document = serde_json::from_slice::<serde_json::Value>(&body).unwrap_or_default();
            if let Some(media_type) = document["mediaType"].as_str() {
                extra += &format!("Content-Type: {media_type}\r\n");
            }
            (
                if offset.is_some() { 206 } else { 200 },
                extra,
                body,
                fault,
                offset.unwrap_or(0).min(body_len(&state, &digest)),
            )
        };
        let mut body = body[offset..].to_vec();
        match fault {
            None => respond(out, status, &extra, &body).map(|()| true),
            Some(Fault::Say(status, text)) => {
                respond(out, status, "", text.as_bytes()).map(|()| true)
            }
            Some(Fault::Redirect(address)) => {
                let location = format!("Location: {address}\r\n");
                respond(out, 307, &location, b"").map(|()| true)
            }
            Some(Fault::Drip(delay)) => {
                head(out, status, &extra, body.len())?;
                for byte in body.chunks(1) {
                    out.write_all(byte)?;
                    std::thread::sleep(Duration::from_millis(delay));
                }
                Ok(true)
            }
            Some(Fault::Status(status)) => respond(out, status, "", b"no").map(|()| true),
            Some(Fault::Corrupt) => {
                let middle = body.len() / 2;
                body[middle] ^= 1;
                respond(out, status, &extra, &body).map(|()| true)
            }
            Some(Fault::Longer) => {
                body.extend_from_slice(&[0; 5000]);
                respond(out, status, &extra, &body).map(|()| true)
            }
            Some(Fault::Cut(count)) => {
                head(out, status, &extra, body.len())?;
                out.write_all(&body[..count.min(body.len())])?;
                Ok(false)
            }
            Some(Fault::Stall(count)) => {
                head(out, status, &extra, body.len())?;
                out.write_all(&body[..count.min(body.len())])?;
                std::thread::sleep(Duration::from_secs(60));
                Ok(false)
            }
            Some(Fault::Slow(delay)) => {
                head(out, status, &extra, body.len())?;
                for piece in body.chunks(64 * 1024) {
                    out.write_all(piece)?;
                    std::thread::sleep(Duration::from_millis(delay));
                }
                Ok(true)
            }
        }
    }
}

fn body_len(state: &State, digest: &str) -> usize {
    state.blobs[digest].len()
}

fn head(out: &mut TcpStream, status: u16, extra: &str, length: usize) -> std::io::Result<()> {
    write!(
        out,
        "HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n{extra}\r\n"
    )
}

fn respond(out: &mut TcpStream, status: u16, extra: &str, body: &[u8]) -> std::io::Result<()> {
    head(out, status, extra, body.len())?;
    out.write_all(body)
}
