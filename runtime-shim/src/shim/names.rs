//! The resolver of a sandbox on networks: knows the containers beside it, and asks the host's resolvers for the rest.
//!
//! The agent passes on what the guest's programs ask, so all of it is hostile: one question a message, bounded, and
//! only so many at a time.

use crate::files;
use crate::network;
use crate::network::cni::{self, Outcome};
use crate::network::egress::Policy;
use crate::network::wish::{self, Wish};
use crate::state::{Container, DEFAULT_NAMESPACE, StateRoot};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UdpSocket, UnixStream};
use tokio::sync::{Semaphore, mpsc};

/// Questions that are answered at the same time; further ones wait, and their askers with them.
const AT_ONCE: usize = 64;
/// A question has a name of at most 255 bytes, and little else.
const MAX_QUESTION: usize = 4096;
/// As clients offer to take at most.
const MAX_ANSWER: usize = 4096;
/// Before the next resolver is asked; clients wait for five seconds.
const PATIENCE: Duration = Duration::from_millis(2500);
/// As many as resolv.conf has.
const MAX_RESOLVERS: usize = 3;
/// Names come and go with containers.
const TTL: u32 = 0;
const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
const SERVER_FAILED: u8 = 2;
const REFUSED: u8 = 5;

/// What it goes by.
pub(super) struct Names {
    pub(super) state_dir: PathBuf,
    /// The sandbox's own.
    pub(super) wish: Wish,
}

/// Serves on our end of the stream until the guest's is gone.
pub(super) fn serve(names: Names, stream: OwnedFd) -> io::Result<()> {
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    let (mut questions, mut answers) = UnixStream::from_std(stream)?.into_split();
    let (tell, mut told) = mpsc::channel::<Vec<u8>>(AT_ONCE);
    tokio::spawn(async move {
        while let Some(answer) = told.recv().await {
            let mut frame = (answer.len() as u16).to_be_bytes().to_vec();
            frame.extend(answer);
            if answers.write_all(&frame).await.is_err() {
                return;
            }
        }
    });
    let names = Arc::new(names);
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    tokio::spawn(async move {
        while let Ok(length) = questions.read_u16().await {
            let mut question = vec![0; usize::from(length)];
            let read = questions.read_exact(&mut question).await;
            if read.is_err() || question.len() > MAX_QUESTION {
                return;
            }
            let Ok(permit) = at_once.clone().acquire_owned().await else {
                return;
            };
            let (names, tell) = (names.clone(), tell.clone());
            tokio::spawn(async move {
                if let Some(answer) = names.answer(question).await {
                    let _ = tell.send(answer).await;
                }
                drop(permit);
            });
        }
    });
    Ok(())
}

impl Names {
    /// The answer to a message; `None`: it is no question.
    async fn answer(&self, message: Vec<u8>) -> Option<Vec<u8>> {
        let question = Question::parse(&message)?;
        if question.class == CLASS_IN
            && let Some(ips) = self.find(&question.name)
        {
            return Some(question.answered(&message, &ips));
        }
        let mut refused = false;
        for resolver in self.resolvers() {
            if !self.may_ask(resolver) {
                refused = true;
            } else if let Ok(answer) = ask(resolver, &message).await {
                return Some(answer);
            }
        }
        let code = if refused { REFUSED } else { SERVER_FAILED };
        Some(question.reply(&message, code, 0))
    }

    /// The addresses of the container that is called so on a network of ours.
    fn find(&self, name: &str) -> Option<Vec<IpAddr>> {
        let root = StateRoot::open(&self.state_dir, DEFAULT_NAMESPACE).ok()?;
        let containers = root.containers().ok()?;
        let mut alive = containers.iter().filter(|c| c.status.state.is_alive());
        alive.find_map(|container| self.addresses(container, name))
    }

    /// A container's addresses on networks of ours, if that is its name there.
    fn addresses(&self, container: &Container, name: &str) -> Option<Vec<IpAddr>> {
        let wish = Wish::read(&container.dir).ok().flatten()?;
        let mut ips = Vec::new();
        for (number, attachment) in wish.attachments.iter().enumerate() {
            let mut ours = self.wish.attachments.iter();
            if !ours.any(|own| own.network == attachment.network) {
                continue;
            }
            let suffix = format!(".{}", attachment.network.to_ascii_lowercase());
            let name = name.strip_suffix(&suffix).unwrap_or(name);
            let is = |other: &str| other.eq_ignore_ascii_case(name);
            let meta = &container.meta;
            if !is(&meta.name)
                && !is(&meta.id[..meta.id.len().min(12)])
                && !attachment.aliases.iter().any(|alias| is(alias))
            {
                continue;
            }
            let result = network::result(&container.dir, &wish::interface(number));
            let outcome = result.and_then(|result| serde_json::from_value(result).ok());
            let outcome: Outcome = outcome.unwrap_or_default();
            ips.extend(outcome.ips.iter().filter_map(cni::Ip::parts).map(|ip| ip.0));
        }
        (!ips.is_empty()).then_some(ips)
    }

    /// Those of `--dns`, else the host's as they are now.
    fn resolvers(&self) -> Vec<IpAddr> {
        const MAX_FILE: u64 = 64 << 10;
        if !self.wish.dns.is_empty() {
            return self.wish.dns.iter().copied().take(MAX_RESOLVERS).collect();
        }
        let text = files::read_text("/etc/resolv.conf".as_ref(), MAX_FILE).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.trim_start().strip_prefix("nameserver"))
            .filter_map(|ip| ip.trim().parse().ok())
            .take(MAX_RESOLVERS)
            .collect()
    }

    /// A guest that may send nowhere must not do so in questions either.
    fn may_ask(&self, resolver: IpAddr) -> bool {
        let policy = self.wish.egress.as_ref();
        policy.is_none_or(|policy| !policy.deny || Policy::allows(policy, resolver, 53, "udp"))
    }
}

/// Asks a resolver in our own name.
async fn ask(resolver: IpAddr, message: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match resolver {
        IpAddr::V4(_) => ([0; 4], 0).into(),
        IpAddr::V6(_) => ([0; 16], 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect((resolver, 53)).await?;
    // Not to be guessed by one who would answer in the resolver's place.
    let mut id = [0; 2];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    let mut question = message.to_vec();
    question[..2].copy_from_slice(&id);
    socket.send(&question).await?;
    let mut answer = vec![0; MAX_ANSWER];
    let received = async {
        loop {
            let length = socket.recv(&mut answer).await?;
            if length >= HEADER && answer[..2] == id {
                return io::Result::Ok(length);
            }
        }
    };
    let length = tokio::time::timeout(PATIENCE, received).await??;
    answer.truncate(length);
    answer[..2].copy_from_slice(&message[..2]);
    Ok(answer)
}

/// What a message asks.
#[derive(Debug, PartialEq)]
struct Question {
    name: String,
    kind: u16,
    class: u16,
    /// Where it ends in the message.
    end: usize,
}

impl Question {
    fn parse(message: &[u8]) -> Option<Self> {
        let word = |at: usize| {
            Some(u16::from_be_bytes(
                message.get(at..at + 2)?.try_into().ok()?,
            ))
        };
        let is_answer = word(2)? & 0x8000 != 0;
        if is_answer || word(4)? != 1 {
            return None;
        }
        let (mut at, mut labels) = (HEADER, Vec::new());
        loop {
            let length = usize::from(*message.get(at)?);
            at += 1;
            if length == 0 {
                break;
            }
            // A reference to elsewhere makes no sense here.
            if length > 63 || at + length > HEADER + 255 {
                return None;
            }
            let label = String::from_utf8_lossy(message.get(at..at + length)?);
            labels.push(label.to_ascii_lowercase());
            at += length;
        }
        Some(Self {
            name: labels.join("."),
            kind: word(at)?,
            class: word(at + 2)?,
            end: at + 4,
        })
    }

    /// A reply with nothing but the question.
    fn reply(&self, message: &[u8], code: u8, answers: u16) -> Vec<u8> {
        let mut reply = message[..self.end].to_vec();
        // An answer, with authority; what was desired of recursion is kept, and there is some.
        reply[2] = reply[2] & 0x79 | 0x84;
        reply[3] = 0x80 | code;
        reply[4..HEADER].fill(0);
        reply[5] = 1;
        reply[6..8].copy_from_slice(&answers.to_be_bytes());
        reply
    }

    /// A reply with those of the addresses that are asked for.
    fn answered(&self, message: &[u8], ips: &[IpAddr]) -> Vec<u8> {
        let bytes = |ip: &IpAddr| match (ip, self.kind) {
            (IpAddr::V4(ip), TYPE_A) => Some(ip.octets().to_vec()),
            (IpAddr::V6(ip), TYPE_AAAA) => Some(ip.octets().to_vec()),
            _ => None,
        };
        let all: Vec<Vec<u8>> = ips.iter().filter_map(bytes).collect();
        let mut reply = self.reply(message, 0, all.len() as u16);
        for ip in all {
            // The name is the question's.
            reply.extend([0xc0, HEADER as u8]);
            reply.extend(self.kind.to_be_bytes());
            reply.extend(CLASS_IN.to_be_bytes());
            reply.extend(TTL.to_be_bytes());
            reply.extend((ip.len() as u16).to_be_bytes());
            reply.extend(ip);
        }
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A question for a name.
    fn message(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend(label.as_bytes());
        }
        bytes.extend([0, 0, kind as u8, 0, 1]);
        bytes
    }

    #[test]
    fn question_is_answered_with_addresses_of_its_kind() {
        let asked = message("Web.Net", TYPE_A);
        let question = Question::parse(&asked).unwrap();
        assert_eq!((&*question.name, question.end), ("web.net", asked.len()));
        let ips = ["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let reply = question.answered(&asked, &ips);
        assert_eq!(reply[..8], [7, 7, 0x85, 0x80, 0, 1, 0, 1]);
        assert!(reply.ends_with(&[0, 4, 10, 0, 0, 2]));
        let mail = Question {
            kind: 15,
            ..question
        };
        assert_eq!(mail.answered(&asked, &ips)[6..8], [0, 0]);
    }

    #[test]
    fn question_that_is_none_is_refused() {
        let asked = message("web", TYPE_A);
        for end in 0..asked.len() {
            assert_eq!(Question::parse(&asked[..end]), None, "{end}");
        }
        let mut answer = asked.clone();
        answer[2] |= 0x80;
        assert_eq!(Question::parse(&answer), None);
        let mut reference = asked.clone();
        reference[HEADER] = 0xc0;
        assert_eq!(Question::parse(&reference), None);
    }

    proptest::proptest! {
        #[test]
        fn message_of_anything_never_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            if let Some(question) = Question::parse(&bytes) {
                let ips = [IpAddr::from([10, 0, 0, 1])];
                assert!(question.answered(&bytes, &ips).len() >= question.end);
            }
        }
    }
}
